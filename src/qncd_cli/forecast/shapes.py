"""From a model source to a denoiser and a first stage without weights, on the meta device.

Read are configurations and the headers of weights, so that it takes seconds whatever the size.
random:NAME also takes the models of `published`, which only a plan can use.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, FluxTransformer2DModel, UNet2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ModelError
from ..models.call_signature import INPAINTING
from ..models.compvis.checkpoint import described_modules
from ..models.digest import is_checkpoint
from ..models.folder_check import check_folder, read_index, reason
from ..models.loading import FIRST_STAGES, UNUSED
from ..models.pipelines import CLASS_CONDITIONAL, is_guided
from ..models.random_models import RANDOM
from ..models.schedule import corrected
from ..models.text import reads_scale, sides_of
from ..models.weight_files import weight_files
from ..models.zoo import zoo_path
from .architectures import PUBLISHED
from .meta_inputs import (
    CLIP_PIPELINES,
    FLUX_TOKENS,
    PIXART_ALPHA_TOKENS,
    TEXT_TOKENS,
    Arguments,
    arguments_of,
)

DENOISERS = ("unet", "transformer")
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Types by their names in safetensors files."""


@dataclass(frozen=True)
class Part:
    """A component of a pipeline, by its size.

    parameters: number of them; stored: bytes on disk, 0 for weights drawn at random; stays:
    whether it is held while the stages run (text encoders are freed); mapped: whether its file
    is mapped into memory as it is, like safetensors that have the type that is asked for.
    """

    parameters: int
    stored: int
    stays: bool
    mapped: bool = False


@dataclass(frozen=True)
class Stored:
    """A component on disk: bytes, elements, and the types that safetensors names."""

    size: int
    elements: int
    types: frozenset[str]


@dataclass(frozen=True)
class Shapes:
    """A diffusion model without its weights.

    arguments: rows -> keyword arguments of the denoiser, tensors on the meta device. classes: of
    the model, 0 for none; guided: whether it has a null class or prompt, and interpolates: how,
    as of DiffusionModel. image_shape: of one image. scheduler: configuration, None where nothing
    says. dtype: of all but the first stage.
    """

    source: str
    is_folder: bool
    dtype: torch.dtype
    denoiser: nn.Module
    first_stage: Any
    parts: dict[str, Part]
    latent_shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    classes: int
    guided: bool
    interpolates: bool
    scheduler: dict[str, Any] | None
    arguments: Callable[[int], Arguments] = field(repr=False)

    def guides(self, scale: float) -> bool:
        """Whether that scale guides, as DiffusionModel.guides says."""
        return self.guided and is_guided(scale, self.interpolates)

    def call(self, rows: int, denoiser: nn.Module | None = None) -> Tensor:
        """One call of the denoiser, or of another one in its place."""
        return (denoiser or self.denoiser)(**self.arguments(rows)).sample

    def denoiser_element_bytes(self) -> int:
        """Bytes of one number of the denoiser, stored without loss: 2 where its files have 16 bits.

        Weights drawn at random have 32.
        """
        part = next(part for name, part in self.parts.items() if name in DENOISERS)
        return 2 if 0 < part.stored <= 2.5 * part.parameters else 4

    def decode(self, rows: int) -> Tensor:
        """Images of so many latents; the first stage computes in float32."""
        latents = torch.empty(rows, *self.latent_shape, device="meta")
        return latents if self.first_stage is None else self.first_stage.decode(latents).sample


def model_shapes(
    source: str,
    dtype: torch.dtype,
    *,
    compvis_config: str | None = None,
    prompts: int = 0,
    image_size: int | tuple[int, int] | None = None,
) -> Shapes:
    """dtype: of all but the first stage; prompts: how many of a text model; image_size: in pixels,
    None for the model's own.

    Hub ids only where the files are here, checkpoints from their YAML alone. Raises ModelError.
    """
    scheduler: dict[str, Any] | None = None
    stored: dict[str, Stored] = {}
    tokens, is_folder, kind = 0, False, ""
    if source.startswith("random:"):
        modules, scheduler = _random(source.removeprefix("random:"))
    elif is_checkpoint(source):
        modules, scheduler = described_modules(source, compvis_config)
        float32 = frozenset({"F32"})  # as those that CompVis published, and mapped as they are
        counts = [(name, _parameters(module)) for name, module in modules.items()]
        stored = {name: Stored(4 * count, count, float32) for name, count in counts}
    else:
        folder, is_folder = _find(source), True
        modules, scheduler, stored = _folder(folder, source)
        kind = read_index(folder, source)["_class_name"]
        tokens = _prompt_tokens(folder, kind)
    name = next((n for n in DENOISERS if n in modules), None)
    if name is None:
        raise ModelError(f"{source}: has no {' or '.join(DENOISERS)}", "is it a diffusion model?")
    denoiser = modules[name].to(dtype).eval().requires_grad_(False)
    first_stage = next((modules[n] for n in FIRST_STAGES if n in modules), None)
    parts = {n: _part(n, m, stored.get(n), dtype) for n, m in modules.items()}
    others = {n: s for n, s in stored.items() if n not in modules and s.elements}
    parts |= {n: Part(s.elements, s.size, False) for n, s in others.items()}
    latent, image = _sizes(denoiser, first_stage, image_size)
    embedder: Any = modules.get("class_embedder")
    classes = _classes(denoiser, embedder)
    if embedder is not None:
        tokens = embedder.config.tokens
    tokens = tokens or TEXT_TOKENS.get(type(denoiser).__name__, 0)
    text = not classes and not isinstance(denoiser, UNet2DModel)
    scaled = text and reads_scale(denoiser)
    flux = isinstance(denoiser, FluxTransformer2DModel)
    return Shapes(
        source=source,
        is_folder=is_folder,
        dtype=dtype,
        denoiser=denoiser,
        first_stage=None if first_stage is None else first_stage.eval().requires_grad_(False),
        parts=parts,
        latent_shape=latent,
        image_shape=image,
        classes=max(1, prompts) if text else classes,
        guided=bool(classes or text) and not flux and not scaled,
        interpolates=bool(classes) and (not kind or kind in CLASS_CONDITIONAL),
        scheduler=scheduler,
        arguments=arguments_of(denoiser, dtype, latent, tokens, scaled),
    )


def _part(name: str, module: nn.Module, stored: Stored | None, dtype: torch.dtype) -> Part:
    own = TYPES[torch.float32 if name in FIRST_STAGES else dtype]
    mapped = stored is not None and stored.types == {own}
    return Part(_parameters(module), 0 if stored is None else stored.size, True, mapped)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _sizes(
    denoiser: Any, first_stage: Any, image_size: int | tuple[int, int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    config = denoiser.config
    scale = 1 if first_stage is None else 2 ** (len(first_stage.config.block_out_channels) - 1)
    flux = isinstance(denoiser, FluxTransformer2DModel)
    sides: Any = 2 * math.isqrt(FLUX_TOKENS) if flux else config.sample_size
    if image_size is not None:
        sides = [side // scale for side in sides_of(image_size)]
    height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
    painting = config.in_channels == INPAINTING
    own = first_stage.config.latent_channels if painting else config.in_channels
    latent = (own // (4 if flux else 1), height, width)
    if first_stage is None:
        return latent, latent
    return latent, (first_stage.config.out_channels, scale * latent[1], scale * latent[2])


def _classes(denoiser: Any, embedder: Any) -> int:
    if embedder is not None:
        return embedder.config.num_classes
    if isinstance(denoiser, DiTTransformer2DModel):
        return denoiser.config.num_embeds_ada_norm
    if isinstance(denoiser, UNet2DModel) and denoiser.config.num_class_embeds:
        return denoiser.config.num_class_embeds - 1
    return 0


def _prompt_tokens(folder: Path, kind: str) -> int:
    """Tokens of a prompt as a folder tells, 0 where it does not. kind: class of its pipeline."""
    encoders = sorted(folder.glob("text_encoder*/config.json"))
    if kind == "PixArtAlphaPipeline":
        return PIXART_ALPHA_TOKENS
    beside = CLIP_PIPELINES.get(kind)
    if beside is None or not encoders:
        return 0
    own = json.loads(encoders[0].read_text(encoding="utf-8")).get("max_position_embeddings", 0)
    return own + beside if own else 0


# ------------------------------------------------------------------ from a source to modules


def _random(name: str) -> tuple[dict[str, nn.Module], dict[str, Any] | None]:
    known = {**PUBLISHED, **RANDOM}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean random:{close[0]}?" if close else f"known: {', '.join(known)}"
        raise ModelError(f"no architecture random:{name}", hint)
    with torch.device("meta"):
        if name not in RANDOM:
            return PUBLISHED[name](), None
        pipeline = RANDOM[name]()
    components = pipeline.components.items()
    modules = {n: module for n, module in components if isinstance(module, nn.Module)}
    return modules, dict(pipeline.scheduler.config)


def _find(source: str) -> Path:
    if source.startswith("zoo:"):
        return zoo_path(source.removeprefix("zoo:"))
    folder = Path(source)
    if not os.path.isdir(folder) and source.count("/") == 1 and source[0] not in "./~":
        try:
            folder = Path(DiffusionPipeline.download(source, local_files_only=True))
        except Exception as error:  # of many kinds; all mean: not here
            raise ModelError(
                f"{source}: is not on this machine, and a plan downloads nothing",
                "give a folder, or the shapes of a published model: "
                + ", ".join(f"random:{n}" for n in {**RANDOM, **PUBLISHED}),
            ) from error
    if not os.path.isfile(folder / "model_index.json"):
        raise ModelError(f"{source}: no model_index.json", "a diffusers pipeline folder has one")
    return folder


Found = tuple[dict[str, nn.Module], dict[str, Any] | None, dict[str, Stored]]


def _folder(folder: Path, source: str) -> Found:
    """Modules on meta; the scheduler's configuration; what is on disk by component, also of those
    that are not diffusers' (text encoders). Raises ModelError."""
    modules: dict[str, nn.Module] = {}
    stored: dict[str, Stored] = {}
    scheduler = None
    index = read_index(folder, source)
    check_folder(folder, source, index)
    try:
        for name, entry in index.items():
            if not isinstance(entry, list) or entry[0] is None or name in UNUSED:
                continue
            if name == "scheduler":
                scheduler = json.loads((folder / name / "scheduler_config.json").read_bytes())
                continue
            stored[name] = _weights(folder / name)
            kind = _module_class(*entry)
            if kind is not None:
                with torch.device("meta"):
                    modules[name] = kind.from_config(kind.load_config(folder / name))
        scheduler = scheduler and corrected(index["_class_name"], modules.get("unet"), scheduler)
    except (OSError, ValueError, KeyError, AttributeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"{source}: cannot be read: {reason(error)}", "is the folder complete?"
        ) from error
    return modules, scheduler, stored


def _module_class(library: str, name: str) -> Any:
    """diffusers' own or ours; None for others."""
    package = __name__.partition(".")[0]
    if library == "diffusers":
        return getattr(diffusers, name)
    if library.startswith(f"{package}.models."):
        return getattr(importlib.import_module(library), name)
    return None


def _weights(folder: Path) -> Stored:
    """Bytes, elements and types of a component's safetensors, in the variant that is loaded."""
    paths = weight_files(folder)
    elements, types = 0, set()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
            elements += sum(math.prod(part.get_shape()) for part in slices)
            types |= {part.get_dtype() for part in slices}
    return Stored(sum(p.stat().st_size for p in paths), elements, frozenset(types))
