"""From a model source to a denoiser and a first stage without weights, on the meta device.

Read are configurations and the headers of weights, so that it takes seconds whatever the size.
random:NAME also takes the models of `published`, which only a plan can use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from ..errors import ModelError
from ..models.call_signature import INPAINTING
from ..models.control import CONTROLNET, join, steer
from ..models.digest import is_checkpoint
from ..models.folder_check import read_index
from ..models.image_size import Sides, check_sizable, latent_sides, pixels_per_latent
from ..models.loading import FIRST_STAGES
from ..models.model_folder import find_base
from ..models.pipelines import CLASS_CONDITIONAL, is_guided
from ..models.text import reads_scale
from ..models.text_encoders import described_encoders
from .described import Stored, at_random, folder_of_source, in_checkpoint, in_folder
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
class Shapes:
    """A diffusion model without its weights.

    arguments: rows -> keyword arguments of the denoiser, tensors on the meta device. classes: of
    the model, 0 for none; guided: whether it has a null class or prompt, and interpolates: how,
    as of DiffusionModel. image_shape: of one image. scheduler: configuration, None where nothing
    says. dtype: of all but the first stage. text: the text encoders, where they were asked for and
    a folder describes them; tokens: of a prompt, 0 where there are none. sized: as DiffusionModel
    has it.
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
    text: nn.Module | None = None
    tokens: int = 0
    sized: Mapping[Sides, Shapes] = field(default_factory=dict)

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
    base: str | None = None,
    prompts: int = 0,
    image_size: int | Sides | None = None,
    sizes: Sequence[Sides] = (),
    text: bool = False,
) -> Shapes:
    """dtype: of all but the first stage; prompts: how many of a text model; image_size: in pixels,
    None for the model's own; sizes: others; text: whether the text encoders are wanted, too.

    Hub ids only where the files are here, checkpoints from their YAML or base. Raises ModelError.
    """
    scheduler: dict[str, Any] | None = None
    stored: dict[str, Stored] = {}
    tokens, is_folder, kind = 0, False, ""
    place: Path | None = None
    if source.startswith("random:"):
        modules, scheduler = at_random(source.removeprefix("random:"))
    elif is_checkpoint(source):
        modules, scheduler, stored = in_checkpoint(source, compvis_config, base)
        place = None if base is None else find_base(base)
    else:
        place, is_folder = folder_of_source(source), True
        modules, scheduler, stored = in_folder(place, source)
    if place is not None:
        kind = read_index(place, source)["_class_name"]
        tokens = _prompt_tokens(place, kind)
    name = next((n for n in DENOISERS if n in modules), None)
    if name is None:
        raise ModelError(f"{source}: has no {' or '.join(DENOISERS)}", "is it a diffusion model?")
    if CONTROLNET in modules:
        own, beside = stored.get(name), stored.pop(CONTROLNET, None)
        join(modules[name], modules.pop(CONTROLNET)).register_forward_pre_hook(
            steer, with_kwargs=True
        )
        if own is not None and beside is not None:
            stored[name] = Stored(
                own.size + beside.size, own.elements + beside.elements, own.types | beside.types
            )
    denoiser = modules[name].to(dtype).eval().requires_grad_(False)
    first_stage = next((modules[n] for n in FIRST_STAGES if n in modules), None)
    parts = {n: _part(n, m, stored.get(n), dtype) for n, m in modules.items()}
    others = {n: s for n, s in stored.items() if n not in modules and s.elements}
    parts |= {n: Part(s.elements, s.size, False) for n, s in others.items()}
    embedder: Any = modules.get("class_embedder")
    classes = _classes(denoiser, embedder)
    if embedder is not None:
        tokens = embedder.config.tokens
    tokens = tokens or TEXT_TOKENS.get(type(denoiser).__name__, 0)
    prompted = not classes and not isinstance(denoiser, UNet2DModel)
    scaled = prompted and reads_scale(denoiser)
    flux = isinstance(denoiser, FluxTransformer2DModel)
    if not prompted and (image_size is not None or sizes):
        check_sizable(source, denoiser, first_stage)

    def sized(size: int | Sides | None) -> dict[str, Any]:
        latent, image = _sizes(kind if prompted and kind else source, denoiser, first_stage, size)
        arguments = arguments_of(denoiser, dtype, latent, tokens, scaled)
        return {"latent_shape": latent, "image_shape": image, "arguments": arguments}

    shapes = Shapes(
        source=source,
        is_folder=is_folder,
        dtype=dtype,
        denoiser=denoiser,
        first_stage=None if first_stage is None else first_stage.eval().requires_grad_(False),
        parts=parts,
        classes=max(1, prompts) if prompted else classes,
        guided=bool(classes or prompted) and not flux and not scaled,
        interpolates=bool(classes) and (not kind or kind in CLASS_CONDITIONAL),
        scheduler=scheduler,
        text=described_encoders(place, source) if text and place is not None else None,
        tokens=tokens,
        **sized(image_size),
    )
    return replace(shapes, sized={size: replace(shapes, **sized(size)) for size in sizes})


def _part(name: str, module: nn.Module, stored: Stored | None, dtype: torch.dtype) -> Part:
    own = TYPES[torch.float32 if name in FIRST_STAGES else dtype]
    mapped = stored is not None and stored.types == {own}
    return Part(_parameters(module), 0 if stored is None else stored.size, True, mapped)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _sizes(
    name: str, denoiser: Any, first_stage: Any, image_size: int | Sides | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    config, scale = denoiser.config, pixels_per_latent(first_stage)
    flux = isinstance(denoiser, FluxTransformer2DModel)
    sides: Any = 2 * math.isqrt(FLUX_TOKENS) if flux else config.sample_size
    if image_size is not None:
        sides = latent_sides(name, denoiser, scale, image_size)
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
