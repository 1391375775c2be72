"""The quantized denoiser as one safetensors file that ComfyUI and its relatives load.

Layers keep the artifact's codes where a format of comfyui_layers.py holds them exactly; all else is
bfloat16. Ranges of inputs are not part of it: they are found anew in every call. What that does to
images is measured by simulating it, before anything is written.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from ..config.schema import Config
from ..errors import ArtifactError
from ..metrics.tensor import psnr_db
from ..models.loading import DiffusionModel
from ..models.original_names import PREFIX, Place, known_sizes, places
from ..models.topology import replace_module, weight_layers
from ..progress import Track
from ..quant.layers import QuantizedLayer, StepState
from ..runtime.denoiser import Denoiser, full_denoiser, quantized_denoiser
from ..store.artifacts import Artifact
from ..store.files import replacing
from . import agreement
from .comfyui_layers import FLOAT, INT8, W4A8, Held, bias_of, by_rows, held, joined, swapped

FORMATS = (INT8, W4A8, FLOAT)
PACKED_IN = ("joint_blocks.", "double_blocks.", "single_blocks.", ".transformer_blocks.")
"""Where a layer may have half as many columns: ComfyUI reads sizes off the layers elsewhere."""
READ_OFF = "attn2.to_k"
"""The layer of a U-Net that it reads the width of the text off."""


def check_target(path: Path, *, force: bool) -> None:
    """Raises ArtifactError unless a file may be written there."""
    if path.suffix != ".safetensors":
        raise ArtifactError(f"{path}: is no .safetensors", "name a file that ends so")
    if path.is_dir():
        raise ArtifactError(f"{path}: is a folder", "name a file")
    if path.exists() and not force:
        raise ArtifactError(f"{path}: is there already", "--force replaces it")


def run(
    config: Config,
    model: DiffusionModel,
    quantized: Artifact,
    path: Path,
    samples: int,
    bound: float | None,
    track: Track,
) -> dict[str, Any]:
    """Write the file; what was written, and what it does to images.

    model: on the CPU in float32; samples: drawn by full precision, by the simulate backend and as
    ComfyUI will; bound: on the largest difference of one prediction from the artifact's, as a share
    of the largest prediction. Raises ArtifactError beyond it and ModelError for a model that
    ComfyUI has no names for; nothing is written then.
    """
    there = places(model.denoiser)
    cache = quantized.body["cache_time_embeddings"]
    simulated = quantized_denoiser(model, quantized, "simulate", cache)
    layers = {n: m for n, m in simulated.module.named_modules() if isinstance(m, QuantizedLayer)}
    weights = _weights(there, layers)
    state = model.denoiser.state_dict()
    tensors = _tensors(there, weights, layers, state)
    read = _as_read(model.denoiser, weights, there, layers)
    compared = compare(config, model, simulated, read, samples, track)
    difference = compared["relative_difference"]
    if not math.isfinite(difference) or (bound is not None and difference > bound):
        raise ArtifactError(
            f"--to comfyui: a prediction differs from the artifact's by {difference:.3g} of the "
            f"largest one, more than the bound {math.inf if bound is None else bound:g}",
            "nothing was written; --bound allows more",
        )
    said = {
        "source": model.source,
        "model": model.digest,
        "quantized": quantized.digest,
        "version": __version__,
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"qncd": json.dumps(said, sort_keys=True)})
    return {
        "known_sizes": known_sizes(model.denoiser),
        "layers": [{"name": k, "format": w.format, "why": w.why} for k, w in weights.items()],
        "sizes": _sizes(path, quantized, layers, state),
        "agreement": compared,
    }


# ------------------------------------------------------------------ tensors


def _weights(there: Mapping[str, Place], layers: Mapping[str, QuantizedLayer]) -> dict[str, Held]:
    """What the file holds of the quantized layers, by the name there."""
    found: dict[str, Held] = {}
    for key, names in _groups(there).items():
        owners = [name.removesuffix(".weight") for name in names]
        if not key.endswith(".weight") or not all(owner in layers for owner in owners):
            continue
        parts = []
        for name, owner in zip(names, owners, strict=True):
            part = held(layers[owner])
            parts.append(swapped(part) if there[name].swapped else part)
        whole, layer = joined(parts), key.removesuffix(".weight")
        inside = any(block in layer for block in PACKED_IN)
        if whole.format == W4A8 and (not inside or layer.endswith(READ_OFF)):
            whole = replace(whole, format=INT8, why="ComfyUI reads a size off it")
        found[layer] = whole
    return found


def _groups(there: Mapping[str, Place]) -> dict[str, list[str]]:
    """Names of the file -> the parameters that they hold, in their order."""
    groups: dict[str, list[str]] = {}
    for name in sorted(there, key=lambda name: there[name].part):
        groups.setdefault(there[name].key, []).append(name)
    return groups


def _tensors(
    there: Mapping[str, Place],
    weights: Mapping[str, Held],
    layers: Mapping[str, QuantizedLayer],
    state: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, names in _groups(there).items():
        layer = key.removesuffix(".weight")
        if key.endswith(".weight") and layer in weights:
            stored = weights[layer].tensors()
            found |= {f"{PREFIX}{layer}.{end}": t.contiguous() for end, t in stored.items()}
            continue
        parts = []
        for name in names:
            value = _float(name, layers, state)
            parts.append(torch.cat(value.chunk(2)[::-1]) if there[name].swapped else value)
        found[f"{PREFIX}{key}"] = torch.cat(parts).to(torch.bfloat16).contiguous()
    return found


def _float(name: str, layers: Mapping[str, QuantizedLayer], state: Mapping[str, Tensor]) -> Tensor:
    """A parameter as the file has it before it is rounded to bfloat16."""
    owner, _, leaf = name.rpartition(".")
    layer = layers.get(owner)
    if layer is None:
        return state[name]
    if leaf == "weight":  # joined with one that is not quantized
        return held(layer).dequantized()
    bias = bias_of(layer)
    assert bias is not None
    return bias


def _sizes(
    path: Path,
    quantized: Artifact,
    layers: Mapping[str, QuantizedLayer],
    state: Mapping[str, Tensor],
) -> dict[str, int]:
    """Bytes of the file, and of the artifact with what stays unquantized in two bytes."""
    codes = sum(t.numel() * t.element_size() for t in quantized.tensors.values())
    rest = sum(2 * t.numel() for n, t in state.items() if n.rpartition(".")[0] not in layers)
    return {"file": path.stat().st_size, "artifact": codes + rest}


# ------------------------------------------------------------------ what it does to images


def _as_read(
    original: nn.Module,
    weights: Mapping[str, Held],
    there: Mapping[str, Place],
    layers: Mapping[str, QuantizedLayer],
) -> Denoiser:
    """The denoiser that ComfyUI makes of the file, its products summed in float32."""
    module = copy.deepcopy(original)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(torch.bfloat16).float())
        own = weight_layers(module)
        for name, layer in layers.items():
            whole = weights.get(there[f"{name}.weight"].key.removesuffix(".weight"))
            if whole is not None and whole.format != FLOAT:
                rows = copy.copy(layer)
                rows.compute = by_rows
                replace_module(module, name, rows)
                continue
            own[name].weight.copy_(held(layer).dequantized().to(torch.bfloat16).float())
            bias, mine = bias_of(layer), own[name].bias
            if bias is not None and mine is not None:
                mine.copy_(bias.to(torch.bfloat16).float())
    return Denoiser(module, StepState())


def compare(
    config: Config,
    model: DiffusionModel,
    simulated: Denoiser,
    read: Denoiser,
    samples: int,
    track: Track,
) -> dict[str, Any]:
    """How far the file's predictions and images are from the artifact's, over the run's sampler.

    relative_difference: of guided predictions on the artifact's own inputs at every step; PSNR in
    dB of images from the same noise, None where they are identical.
    """
    denoisers = {"full": full_denoiser(model), "artifact": simulated, "file": read}
    found = agreement.measure(
        config, model, denoisers, "artifact", "file", samples, track, "simulating ComfyUI"
    )
    full, artifact, file = (found.images[name] for name in denoisers)

    def psnr(reference: Tensor, noisy: Tensor) -> float | None:
        found = psnr_db(reference, noisy)
        return found if math.isfinite(found) else None

    return {
        "samples": samples,
        "steps": config.sampling.steps,
        "relative_difference": found.relative,
        "psnr_to_artifact_db": psnr(artifact, file),
        "psnr_to_full_db": psnr(full, file),
        "artifact_psnr_to_full_db": psnr(full, artifact),
    }
