"""The tensor files of a run: what they hold, how they are written, how they are checked.

This module is their only reader and writer. They are safetensors with one metadata key, `qncd`, of
canonical JSON: kind, schema version, digest of the configuration, digest of the model, digests of
the parent artifacts, versions, a `body` that depends on the kind (the table below), and `content`,
a SHA-256 over all of that and every tensor. Same inputs, same bytes.

Reading is strict: the first missing, extra or mis-shaped tensor is named together with the command
that makes a good file; a file changed by one byte does not pass its content digest.

Tensor names (G timestep groups, R calibration rows, T timesteps, C channels):

| kind | tensors | body |
|---|---|---|
| calibration | inputs.{x, prediction} [R, C, ...], inputs.{timestep, class, seed} [R]; per layer .input_{min, max, moving_min, moving_max} [G], .input_histogram [G, BINS], .input_histogram_exponent [G], .input_channel_absmax [C_in]; per attention module the same with query, key and value for input | rows, latent_shape, groups, layers {name: in_channels}, attention {name: channels}, timesteps |
| smoothing | per layer .smoothing [C_in], .shift [C_in] where shifted | layers {name: {in_channels, chosen, clamped, shifted}} |
| quantized | per layer .weight (codes; per output channel one bit stream along the flattened input dimension, lowest bit first: two 4-bit codes to a byte, low nibble first), .weight_scale [O], .weight_zero_point [O] (below 8 bits), .input_scale, .input_zero_point [G], .smoothing, .shift [C_in], .bias [O], .bias_correction [G, O]; per attention module .{query, key, value}_{scale, zero_point} [G] | layers {name: entry}, attention {name: entry}, groups, group_bounds |
| noise_stats | timesteps [T], mean, variance, residual_mean, affine_a, affine_b, runtime_mean [T, C], correlation_k, residual_variance, runtime_variance, runtime_slope, runtime_tensor_gain, runtime_channel_gain, runtime_slope_gain [T] | channels, steps, sampling, target |
| latents | latents [N, C, ...], seeds, classes [N]; predictions [K, S, C, ...], prediction_seeds [K] of the first K seeds | count, latent_shape, traced, steps, extra_calls |
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import __version__
from .digests import canonical_json
from .errors import ArtifactError
from .files import replacing
from .spec import ATTENTION_OPERANDS

HISTOGRAM_BINS = 2048
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Artifact:
    """One tensor file: its tensors by name, its body, and where it comes from."""

    kind: str
    tensors: dict[str, Tensor]
    body: dict[str, Any]
    config: str
    model: str
    parents: dict[str, str] = field(default_factory=dict)
    digest: str = ""
    path: Path | None = None


def tensors_below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def tensors_by_module(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module by what stands after the last dot of their names."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        found.setdefault(module, {})[part] = tensor
    return found


# ------------------------------------------------------------------ grammar


def packed_width(in_features: int, bits: int) -> int:
    """Bytes of one output channel's codes: one stream of bits, filled up to a whole byte, or two
    bytes for each code."""
    return 2 * in_features if bits > 8 else -(-in_features * bits // 8)


def _code_layout(out: int, in_features: int, bits: int) -> tuple[torch.dtype, tuple[int, ...]]:
    if bits > 8:
        return torch.int16, (out, in_features)
    return torch.int8 if bits == 8 else torch.uint8, (out, packed_width(in_features, bits))


def _calibration_layout(body: dict) -> Layout:
    rows, latent, groups = body["rows"], tuple(body["latent_shape"]), body["groups"]
    layout: Layout = {
        "inputs.x": (torch.float32, (rows, *latent)),
        "inputs.prediction": (torch.float32, (rows, *latent)),
        "inputs.timestep": (torch.float32, (rows,)),
        "inputs.class": (torch.int64, (rows,)),
        "inputs.seed": (torch.int64, (rows,)),
    }
    observed = {f"{name}.input": channels for name, channels in body["layers"].items()}
    for name, channels in body["attention"].items():
        observed |= {f"{name}.{operand}": channels for operand in ATTENTION_OPERANDS}
    for name, channels in observed.items():
        for part in ("min", "max", "moving_min", "moving_max"):
            layout[f"{name}_{part}"] = (torch.float32, (groups,))
        layout[f"{name}_histogram"] = (torch.int64, (groups, HISTOGRAM_BINS))
        layout[f"{name}_histogram_exponent"] = (torch.int64, (groups,))
        layout[f"{name}_channel_absmax"] = (torch.float32, (channels,))
    return layout


def _smoothing_layout(body: dict) -> Layout:
    layout: Layout = {}
    for name, entry in body["layers"].items():
        channels = (torch.float32, (entry["in_channels"],))
        layout[f"{name}.smoothing"] = channels
        if entry["shifted"]:
            layout[f"{name}.shift"] = channels
    return layout


def _quantized_layout(body: dict) -> Layout:
    groups = body["groups"]
    layout: Layout = {}
    for name, entry in body["layers"].items():
        out, *rest = entry["weight_shape"]
        in_features = 1
        for size in rest:
            in_features *= size
        bits = entry["weight_bits"]
        if bits == 32:
            layout[f"{name}.weight"] = (torch.float32, (out, *rest))
        else:
            layout[f"{name}.weight"] = _code_layout(out, in_features, bits)
            layout[f"{name}.weight_scale"] = (torch.float32, (out,))
            if bits < 8:
                layout[f"{name}.weight_zero_point"] = (torch.uint8, (out,))
        if entry["activation_bits"] != 32:
            layout[f"{name}.input_scale"] = (torch.float32, (groups,))
            layout[f"{name}.input_zero_point"] = (torch.int32, (groups,))
        if entry["smoothed"]:
            layout[f"{name}.smoothing"] = (torch.float32, (entry["in_channels"],))
        if entry["shifted"]:
            layout[f"{name}.shift"] = (torch.float32, (entry["in_channels"],))
        if entry["bias"]:
            layout[f"{name}.bias"] = (torch.float32, (out,))
        if entry["bias_corrected"]:
            layout[f"{name}.bias_correction"] = (torch.float32, (groups, out))
    for name, entry in body["attention"].items():
        for operand in ATTENTION_OPERANDS if entry["bits"] != 32 else ():
            layout[f"{name}.{operand}_scale"] = (torch.float32, (groups,))
            layout[f"{name}.{operand}_zero_point"] = (torch.int32, (groups,))
    return layout


def _noise_stats_layout(body: dict) -> Layout:
    steps, channels = body["steps"], body["channels"]
    per_channel = ("mean", "variance", "residual_mean", "affine_a", "affine_b", "runtime_mean")
    runtime = ("variance", "slope", "tensor_gain", "channel_gain", "slope_gain")
    per_step = ("correlation_k", "residual_variance", *[f"runtime_{name}" for name in runtime])
    layout: Layout = {"timesteps": (torch.int64, (steps,))}
    layout |= dict.fromkeys(per_channel, (torch.float32, (steps, channels)))
    layout |= dict.fromkeys(per_step, (torch.float32, (steps,)))
    return layout


def _latents_layout(body: dict) -> Layout:
    count, latent = body["count"], tuple(body["latent_shape"])
    return {
        "latents": (torch.float32, (count, *latent)),
        "seeds": (torch.int64, (count,)),
        "classes": (torch.int64, (count,)),
        "predictions": (torch.float32, (body["traced"], body["steps"], *latent)),
        "prediction_seeds": (torch.int64, (body["traced"],)),
    }


@dataclass(frozen=True)
class _Kind:
    version: int
    layout: Callable[[dict], Layout]
    command: str  # what makes a good file


KINDS: dict[str, _Kind] = {
    "calibration": _Kind(2, _calibration_layout, "qncd calibrate"),
    "smoothing": _Kind(2, _smoothing_layout, "qncd calibrate"),
    "quantized": _Kind(2, _quantized_layout, "qncd quantize"),
    "noise_stats": _Kind(2, _noise_stats_layout, "qncd quantize"),
    "latents": _Kind(1, _latents_layout, "qncd sample"),
}


# ------------------------------------------------------------------ writing


def _content_digest(meta: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(canonical_json({**meta, "content": ""}).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _meta(artifact: Artifact, content: str) -> dict[str, Any]:
    return {
        "kind": artifact.kind,
        "schema": KINDS[artifact.kind].version,
        "config": artifact.config,
        "model": artifact.model,
        "parents": artifact.parents,
        "versions": {"qncd": __version__, "torch": torch.__version__},
        "body": artifact.body,
        "content": content,
    }


def seal(artifact: Artifact) -> Artifact:
    """Check against the grammar and give the artifact its digest, before it is written."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in artifact.tensors.items()}
    problem = _compare(tensors, KINDS[artifact.kind].layout(artifact.body))
    assert problem is None, f"{artifact.kind}: {problem}"
    digest = _content_digest(_meta(artifact, ""), tensors)
    return replace(artifact, tensors=tensors, digest=digest)


def description(artifact: Artifact) -> str:
    """What a file says of a sealed artifact beside its tensors: canonical JSON."""
    return canonical_json(_meta(artifact, artifact.digest))


def write(path: Path, artifact: Artifact) -> Artifact:
    """Seal, write atomically, return the artifact with its digest and path."""
    sealed = seal(artifact)
    with replacing(path) as temporary:
        try:
            save_file(sealed.tensors, temporary, metadata={"qncd": description(sealed)})
        except SafetensorError as error:
            raise _system_error(error) from error
    return replace(sealed, path=path)


def _system_error(error: SafetensorError) -> OSError:
    """What safetensors says in words of the system's error: "... (os error 28)"."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]) if found else errno.EIO, str(error))


# ------------------------------------------------------------------ reading


def _compare(tensors: dict[str, Tensor], layout: Layout) -> str | None:
    """The first difference between tensors and grammar in words, or None."""
    for name, (dtype, shape) in layout.items():
        if name not in tensors:
            missing = sum(n not in tensors for n in layout)
            return f"{missing} of {len(layout)} tensors missing (first: {name})"
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != dtype:
            return f"{name} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}"
    extra = next((name for name in tensors if name not in layout), None)
    return f"unexpected tensor {extra}" if extra else None


def _load(path: Path) -> tuple[str, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if len(metadata) != 1:
            raise KeyError("metadata")
        return metadata["qncd"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read(path: Path, kind: str | None = None) -> Artifact:
    """Read and check one artifact. kind: what it must be (any, when None).

    Raises ArtifactError: missing, not an artifact, truncated, changed, of another kind or
    version, or with tensors that its own description does not announce.
    """
    again = _again(kind)
    if not path.is_file():
        raise ArtifactError(f"{path}: missing", again)
    try:
        text, tensors = _load(path)
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise ArtifactError(f"{path}: truncated or not a qncd artifact", again) from error
    return checked(path, text, tensors, kind)


def _again(kind: str | None) -> str:
    return f'make it with "{KINDS[kind].command}"' if kind else "repeat the stage that writes it"


def checked(path: Path, text: str, tensors: dict[str, Tensor], kind: str | None = None) -> Artifact:
    """The artifact of a description and tensors found at path. Raises ArtifactError as read does."""
    again = _again(kind)
    try:
        meta = json.loads(text)
        if canonical_json(meta) != text:  # a float may be spelled in two ways, canonically in one
            raise ValueError("not canonical")
        found = KINDS[meta["kind"]]
        good_digest = _content_digest(meta, tensors) == meta["content"]
        version = meta["schema"]
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: truncated or not a qncd artifact", again) from error
    if kind and meta["kind"] != kind:
        raise ArtifactError(f"{path}: holds {meta['kind']}, expected {kind}", again)
    if version != found.version:
        raise ArtifactError(f"{path}: schema {version}, this version reads {found.version}", again)
    if not good_digest:
        raise ArtifactError(f"{path}: damaged, its content does not match its digest", again)
    problem = _compare(tensors, found.layout(meta["body"]))
    if problem:
        raise ArtifactError(f"{path}: {problem}", again)
    return Artifact(
        meta["kind"],
        tensors,
        meta["body"],
        meta["config"],
        meta["model"],
        meta["parents"],
        meta["content"],
        path,
    )


def check_lineage(
    artifact: Artifact,
    *,
    config: str | None = None,
    model: str | None = None,
    parents: dict[str, str] | None = None,
) -> None:
    """Raise ArtifactError unless the artifact was made from just these."""
    command = KINDS[artifact.kind].command
    where = artifact.path or artifact.kind
    if model is not None and artifact.model != model:
        raise ArtifactError(
            f"{where}: made from another model ({artifact.model}, now {model})",
            f'repeat "{command}"',
        )
    if config is not None and artifact.config != config:
        raise ArtifactError(
            f"{where}: made with another configuration ({artifact.config}, now {config})",
            f'repeat "{command}"',
        )
    for name, digest in (parents or {}).items():
        if artifact.parents.get(name) != digest:
            raise ArtifactError(
                f"{where}: made from another {name} artifact than the one in this run",
                f'repeat "{command}"',
            )
