"""What the stages need of each pipeline class that can be quantized, found by role."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config.model_card import STRENGTHS
from ..errors import ModelError
from .call_signature import INPAINTING
from .control import CONTROL, ControlImages, controls, join
from .control import PIPELINES as CONTROL_PIPELINES
from .first_stage import FirstStage, scaled, to_uint8
from .image_size import Sides, check_sizable, pixels_per_latent
from .image_size import latent_sides as sides_for
from .pipelines import CLASS_CONDITIONAL, ClassConditionalPipeline
from .prompt_length import Tell
from .schedule import (
    FLUX_MAX_SHIFT,
    FROM_ONE,
    FROM_ONE_SOLVERS,
    SD3_MAX_SHIFT,
    schedule_of,
    shifted,
)
from .start_images import StartImages, started
from .text import TEXT_TABLES, Encoded, Prompts, latent_sides, reads_scale, told_size

Condition = dict[str, Tensor]
Parts = dict[str, Any]
"""The fields of DiffusionModel that depend on the pipeline class."""
Request = tuple[Prompts | None, Encoded | None]
"""Prompts of a text model, and what they became where that is known already."""


def _class_conditional(pipeline: ClassConditionalPipeline, _: Request) -> Parts:
    denoiser: Any = pipeline.denoiser
    null_class = pipeline.null_class
    first_stage = pipeline.components.get("vqvae")
    return {
        **_shape(denoiser),
        "num_classes": null_class,
        "condition": pipeline.condition,
        "null_condition": lambda n: pipeline.condition(torch.full((n,), null_class)),
        "decode": to_uint8 if first_stage is None else FirstStage(first_stage),
    }


def _dit(pipeline: Any, _: Request) -> Parts:
    """DiTPipeline, whose null class comes after the last class."""
    transformer = pipeline.transformer
    null_class = transformer.config.num_embeds_ada_norm

    def condition(labels: Tensor) -> Condition:
        return {"class_labels": labels.to(transformer.device)}

    return {
        **_shape(transformer),
        "num_classes": null_class,
        "condition": condition,
        "null_condition": lambda n: condition(torch.full((n,), null_class)),
        "decode": FirstStage(pipeline.vae),
    }


def _unconditional(pipeline: Any, _: Request) -> Parts:
    return {
        **_shape(pipeline.unet),
        "num_classes": None,
        "condition": lambda labels: {},
        "null_condition": None,
        "decode": to_uint8,
    }


def _consistency(pipeline: Any, request: Request) -> Parts:
    """Consistency models (arXiv 2303.01469): classes have no null class, and nothing is guided."""
    unet = pipeline.unet
    parts = _unconditional(pipeline, request)
    classes = unet.config.num_class_embeds
    if classes is None:
        return parts
    return {
        **parts,
        "num_classes": classes,
        "condition": lambda labels: {"class_labels": labels.to(unet.device)},
    }


def _unconditional_latents(pipeline: Any, request: Request) -> Parts:
    return {**_unconditional(pipeline, request), "decode": FirstStage(pipeline.vqvae)}


def _text(pipeline: Any, request: Request) -> Parts:
    prompts, encoded = request
    assert prompts is not None and encoded is not None
    table, negative = encoded.table, encoded.negative
    denoiser = pipeline.components.get("transformer") or pipeline.unet
    sides = latent_sides(pipeline, prompts)
    scale = {}
    if reads_scale(denoiser):
        if prompts.negative:
            raise ModelError(
                f"{type(pipeline).__name__}: its denoiser reads the guidance scale and is guided "
                "without a negative prompt",
                "leave negative_prompt out",
            )
        negative = None
        scale = {"timestep_cond": _embedded_scale(pipeline, denoiser, prompts.guidance_scale)}

    of_size, null_size = told_size(pipeline, prompts, encoded)
    alike = of_size | scale

    def condition(labels: Tensor) -> Condition:
        found = {name: value[labels.to(value.device)] for name, value in table.items()}
        return found | {name: value.expand(len(labels), -1) for name, value in alike.items()}

    def null_condition(rows: int) -> Condition:
        null = {**(negative or {}), **null_size}
        return {name: value.expand(rows, *value.shape[1:]) for name, value in null.items()}

    return {
        "denoiser": denoiser,
        "latent_shape": (_channels(pipeline, denoiser), *sides),
        "num_classes": len(prompts.texts),
        "condition": condition,
        "null_condition": None if negative is None else null_condition,
        "decode": FirstStage(pipeline.vae, UNSCALED.get(type(pipeline).__name__, scaled)),
    }


def _channels(pipeline: Any, denoiser: Any) -> int:
    """Channels of latents. Raises ModelError for a U-Net that reads what nobody gives it."""
    channels: int = denoiser.config.in_channels
    if "unet" not in pipeline.components:
        return channels
    latent: int = pipeline.vae.config.latent_channels
    wanted = INPAINTING if "Inpaint" in type(pipeline).__name__ else latent
    if channels != wanted:
        raise ModelError(
            f"{type(pipeline).__name__}: its U-Net reads {channels} channels, not {wanted}",
            "inpainting needs a U-Net of 9 channels in a folder of an inpainting pipeline",
        )
    return latent


def with_size(source: str, pipeline: Any, parts: Parts, size: int | Sides | None) -> Parts:
    """The parts of a model without prompts that draws images of a size in pixels, None for its
    own. Raises ModelError for a model, and for a size, that cannot be."""
    if size is None:
        return parts
    denoiser, first_stage = parts["denoiser"], pipeline.components.get("vqvae")
    check_sizable(source, denoiser, first_stage)
    sides = sides_for(source, denoiser, pixels_per_latent(first_stage), size)
    return {**parts, "latent_shape": (parts["latent_shape"][0], *sides)}


def with_images(pipeline: Any, parts: Parts, images: StartImages | None, tell: Tell) -> Parts:
    """The parts of a text model that begins from images. Raises ModelError."""
    kind = type(pipeline).__name__
    paints, needs = "Inpaint" in kind, "Inpaint" in kind or "Img2Img" in kind
    if images is None and needs:
        raise ModelError(f"{kind} begins from images", "set sampling.images")
    if images is None:
        return parts
    if kind not in STRENGTHS:
        raise ModelError(f"{kind} begins from no images here", "leave sampling.images out")
    if paints != bool(images.masks):
        raise ModelError(
            f"{kind} {'needs' if paints else 'takes no'} masks",
            f"{'set' if paints else 'leave out'} sampling.masks",
        )
    first_stage, factor = pipeline.vae, pipeline.vae_scale_factor

    def encode(image: Tensor) -> Tensor:
        mean = first_stage.encode(image.to(first_stage.device, torch.float32)).latent_dist.mode()
        return mean * first_stage.config.scaling_factor

    if getattr(first_stage.config, "latents_mean", None) is not None:
        raise ModelError(f"{kind}: latents with a mean begin from no images here")
    _, height, width = parts["latent_shape"]
    found = started(pipeline, images, (factor * height, factor * width), encode, tell)
    condition = parts["condition"]
    return {
        **parts,
        "condition": lambda labels: {**condition(labels), **found.condition(labels)},
        "start": found.of,
        "paints": paints,
    }


def with_control(pipeline: Any, parts: Parts, control: ControlImages | None, tell: Tell) -> Parts:
    """The parts of a text model whose ControlNet reads images. Raises ModelError."""
    kind = type(pipeline).__name__
    if control is None and kind in CONTROL_PIPELINES:
        raise ModelError(f"{kind} is steered by images", "set sampling.control")
    if control is None:
        return parts
    if kind not in CONTROL_PIPELINES:
        raise ModelError(f"{kind} has no ControlNet", "leave sampling.control out")
    factor, (_, height, width) = pipeline.vae_scale_factor, parts["latent_shape"]
    images = controls(pipeline, control, (factor * height, factor * width), tell)
    condition = parts["condition"]
    return {
        **parts,
        "denoiser": join(parts["denoiser"], pipeline.controlnet, control.scale),
        "condition": lambda labels: {
            **condition(labels),
            CONTROL: images[labels.to(images.device) % len(images)],
        },
    }


def _embedded_scale(pipeline: Any, denoiser: Any, scale: float) -> Tensor:
    """[1, C]; LCM's scale is 0 where diffusers' is 1 (arXiv 2310.04378, sec. 4.2)."""
    embedded: Tensor = pipeline.get_guidance_scale_embedding(
        torch.tensor([scale - 1]), embedding_dim=denoiser.config.time_cond_proj_dim
    )
    return embedded.to(denoiser.device, denoiser.dtype)


def _stable_diffusion_3(pipeline: Any, request: Request) -> Parts:
    parts = _text(pipeline, request)
    patch = pipeline.transformer.config.patch_size
    _, height, width = parts["latent_shape"]
    tokens = (height // patch) * (width // patch)
    return {**parts, "scheduler_config": shifted(schedule_of(pipeline), tokens, SD3_MAX_SHIFT)}


def _flux(pipeline: Any, request: Request) -> Parts:
    """Reads 2 x 2 latents as one token; dev was distilled to read the guidance scale, [N]."""
    parts, prompts = _text(pipeline, request), request[0]
    assert prompts is not None
    transformer, encoded = pipeline.transformer, parts["condition"]
    channels, height, width = parts["latent_shape"]

    def condition(labels: Tensor) -> Condition:
        scale = torch.full((len(labels),), prompts.guidance_scale, device=transformer.device)
        return {**encoded(labels), "guidance": scale}

    schedule = shifted(schedule_of(pipeline), height * width // 4, FLUX_MAX_SHIFT)
    if schedule["_class_name"] in FROM_ONE_SOLVERS:
        schedule["_class_name"] = FROM_ONE
    return {
        **parts,
        "latent_shape": (channels // 4, height, width),
        "condition": condition if transformer.config.guidance_embeds else encoded,
        "scheduler_config": schedule,
    }


def _shape(denoiser: Any) -> Parts:
    config = denoiser.config
    sides = config.sample_size
    height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
    return {"denoiser": denoiser, "latent_shape": (config.in_channels, height, width)}


def _shifted(config: Any, latents: Tensor) -> Tensor:
    """SD3 and FLUX."""
    return scaled(config, latents) + (config.shift_factor or 0.0)


def _standardized(config: Any, latents: Tensor) -> Tensor:
    """SDXL, of whose relatives Playground 2.5 has a mean and a deviation for every channel."""
    mean, deviation = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
    if mean is None or deviation is None:
        return scaled(config, latents)
    mean, deviation = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, deviation))
    return latents * deviation / config.scaling_factor + mean


UNSCALED = {
    "StableDiffusionXLPipeline": _standardized,
    "StableDiffusionXLImg2ImgPipeline": _standardized,
    "StableDiffusionXLInpaintPipeline": _standardized,
    "StableDiffusionXLControlNetPipeline": _standardized,
    "StableDiffusion3Pipeline": _shifted,
    "FluxPipeline": _shifted,
}
ADAPTERS: dict[str, Callable[[Any, Request], Parts]] = {
    **dict.fromkeys(CLASS_CONDITIONAL, _class_conditional),
    **dict.fromkeys(TEXT_TABLES, _text),
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "FluxPipeline": _flux,
    "DiTPipeline": _dit,
    "DDPMPipeline": _unconditional,
    "DDIMPipeline": _unconditional,
    "LDMPipeline": _unconditional_latents,
    "ConsistencyModelPipeline": _consistency,
}
