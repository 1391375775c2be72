"""From a model source to what the stages need: denoiser, schedule, conditioning, decoder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..errors import BackendUnavailable, ModelError
from .compvis import compvis_pipeline
from .compvis_file import checkpoint_digest, is_checkpoint
from .pipelines import CLASS_CONDITIONAL, ClassConditionalPipeline
from .random_models import SEED, random_pipeline
from .zoo import zoo_path

Condition = dict[str, Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DECODE_BATCH = 64


@dataclass(frozen=True)
class DiffusionModel:
    """A diffusion model as the stages see it; no gradients, in eval mode.

    Its modules live on `device`; latents, labels and images that go in and out live on the CPU.

    denoiser: called as denoiser(x [N, *latent_shape], t, **condition).sample.
    condition: class labels [N] -> keyword arguments of the denoiser, batch first.
    null_condition: number of rows -> the same for the null class; None: no guidance possible.
    decode: latents [N, *latent_shape] -> images uint8 [N, C, H, W].
    num_classes: None for an unconditional model.
    digest: of the files that the model was read from.
    """

    source: str
    digest: str
    denoiser: nn.Module
    scheduler_config: dict[str, Any]
    latent_shape: tuple[int, ...]
    num_classes: int | None
    condition: Callable[[Tensor], Condition]
    null_condition: Callable[[int], Condition] | None
    decode: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    device: torch.device

    def labels(self, seeds: list[int], classes: str | tuple[int, ...]) -> Tensor:
        """One label per seed: classes in turn. Raises ModelError for a class out of range."""
        if self.num_classes is None:
            if classes != "all":
                raise ModelError(
                    f"{self.source} is unconditional and takes no classes", "leave classes: all"
                )
            return torch.zeros(len(seeds), dtype=torch.int64)
        known = range(self.num_classes) if classes == "all" else classes
        bad = [c for c in known if not 0 <= int(c) < self.num_classes]
        if bad:
            raise ModelError(
                f"class {bad[0]} is out of range for {self.source}",
                f"it has classes 0 to {self.num_classes - 1}",
            )
        return torch.tensor([known[s % len(known)] for s in seeds], dtype=torch.int64)

    def denoiser_bytes(self) -> int:
        """Of the denoiser's parameters in float32."""
        return 4 * sum(p.numel() for p in self.denoiser.parameters())


def load_model(
    source: str,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    compvis_config: str | None = None,
) -> DiffusionModel:
    """zoo:NAME, random:NAME, a diffusers folder, a hub id, or a CompVis checkpoint.

    device: auto takes a CUDA device if there is one. compvis_config: the YAML of a checkpoint; no
    other source reads it. Raises ModelError, or BackendUnavailable for a device that is not there.
    """
    place = find_device(device)
    pipeline, digest = _open(source, compvis_config)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.to(place, DTYPES[dtype]).eval().requires_grad_(False)
    kind = type(pipeline).__name__
    if kind not in _ADAPTERS:
        raise ModelError(
            f"{source}: pipeline {kind} is not supported", f"supported: {', '.join(_ADAPTERS)}"
        )
    parts = _ADAPTERS[kind](pipeline)
    return DiffusionModel(
        source=source,
        digest=digest,
        scheduler_config=dict(pipeline.scheduler.config),
        dtype=DTYPES[dtype],
        device=place,
        **parts,
    )


def _open(source: str, compvis_config: str | None) -> tuple[DiffusionPipeline, str]:
    """The pipeline, and the digest of what it was read from."""
    if source.startswith("random:"):
        pipeline = random_pipeline(source.removeprefix("random:"))
        made_from = f"{source} {SEED} {torch.__version__}"
        return pipeline, hashlib.sha256(made_from.encode()).hexdigest()[:16]
    if source.startswith("zoo:"):
        folder = zoo_path(source.removeprefix("zoo:"))
    elif is_checkpoint(source):
        pipeline = compvis_pipeline(source, compvis_config)
        return pipeline, checkpoint_digest(source, str(compvis_config))
    else:
        folder = _find_folder(source)
    return _load_pipeline(folder, source), _digest(folder)


def find_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N. Raises BackendUnavailable."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackendUnavailable(f"unknown device {name}", "use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise BackendUnavailable(f"device {name} is not supported", "use auto, cpu or cuda")
    known = range(torch.cuda.device_count())  # torch reads cuda:999 as index -25
    if device.type == "cuda" and (device.index or 0) not in known:
        raise BackendUnavailable(f"no CUDA device for {name}", "use --device cpu")
    return device


def _find_folder(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelError(
                f"{source}: no model_index.json", "a diffusers pipeline folder has one"
            )
        return path
    if path.is_file():
        raise ModelError(
            f"{source}: is a file",
            "give a diffusers folder, a hub id, zoo:NAME, or a checkpoint (.ckpt, .safetensors)",
        )
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ModelError(f"{source}: no such folder", "give a diffusers folder, hub id or zoo:NAME")
    try:
        return Path(DiffusionPipeline.download(source))
    except Exception as error:  # diffusers and the hub raise many kinds; all mean: not to be had
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"{source}: no such folder, and not to be had from the hub"
            f" ({reason[0][:120] if reason else type(error).__name__})",
            "check the name, or download it and give the folder",
        ) from error


def _load_pipeline(folder: Path, source: str) -> DiffusionPipeline:
    try:
        name = json.loads((folder / "model_index.json").read_text())["_class_name"]
        loader = CLASS_CONDITIONAL.get(name, DiffusionPipeline)
        return loader.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a broken folder fails in as many ways as it can be broken
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"{source}: cannot be loaded: {reason[0][:160] if reason else type(error).__name__}",
            "is the folder complete?",
        ) from error


def _digest(folder: Path) -> str:
    """First 16 hex digits of a SHA-256 over names and contents of the pipeline's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".safetensors", ".bin") or path.name == "training.json":
            continue
        digest.update(os.fsencode(path.relative_to(folder).as_posix()))
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float -> [0, 255] uint8, on the CPU."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)


# ------------------------------------------------------------------ pipeline classes


def _class_conditional(pipeline: ClassConditionalPipeline) -> dict[str, Any]:
    denoiser: Any = pipeline.denoiser
    null_class = pipeline.null_class
    first_stage = pipeline.components.get("vqvae")
    if first_stage is not None:
        first_stage.to(torch.float32)

    def decode(latents: Tensor) -> Tensor:
        latents = latents.to(denoiser.device, torch.float32)
        return torch.cat([to_uint8(pipeline.decode(part)) for part in latents.split(DECODE_BATCH)])

    config = denoiser.config
    return {
        "denoiser": denoiser,
        "latent_shape": (config.in_channels, config.sample_size, config.sample_size),
        "num_classes": null_class,
        "condition": pipeline.condition,
        "null_condition": lambda n: pipeline.condition(torch.full((n,), null_class)),
        "decode": decode,
    }


def _unconditional(pipeline: Any) -> dict[str, Any]:
    config = pipeline.unet.config
    return {
        "denoiser": pipeline.unet,
        "latent_shape": (config.in_channels, config.sample_size, config.sample_size),
        "num_classes": None,
        "condition": lambda labels: {},
        "null_condition": None,
        "decode": to_uint8,
    }


def _unconditional_latents(pipeline: Any) -> dict[str, Any]:
    first_stage = pipeline.vqvae.to(torch.float32)

    def decode(latents: Tensor) -> Tensor:
        scaled = latents.to(first_stage.device, torch.float32) / first_stage.config.scaling_factor
        parts = scaled.split(DECODE_BATCH)
        return torch.cat([to_uint8(first_stage.decode(part).sample) for part in parts])

    return {**_unconditional(pipeline), "decode": decode}


_ADAPTERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    **dict.fromkeys(CLASS_CONDITIONAL, _class_conditional),
    "DDPMPipeline": _unconditional,
    "DDIMPipeline": _unconditional,
    "LDMPipeline": _unconditional_latents,
}
