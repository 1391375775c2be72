"""Sizes of images: those that a model can draw, and the sides of their latents."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel

from ..errors import ModelError

Sides = tuple[int, int]
"""Height and width."""
TAKES_ANY = ("UpBlock2D", "CrossAttnUpBlock2D")
"""Blocks of U-Nets that come back to a size which they are told: to odd ones, too."""


def sides_of(size: int | Sides) -> Sides:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def said(size: int | Sides) -> str:
    """Height x width, as messages write it."""
    return " x ".join(map(str, sides_of(size)))


def pixels_per_latent(first_stage: Any) -> int:
    """Sides of an image over those of its latents; 1 for a model of pixels."""
    return 1 if first_stage is None else 2 ** (len(first_stage.config.block_out_channels) - 1)


def latent_sides(name: str, denoiser: Any, factor: int, size: int | Sides) -> Sides:
    """Sides of latents for images of a size in pixels. name: of the model, for messages; factor:
    pixels per latent.

    U-Nets of `TAKES_ANY` blocks take latents of any size, others what they can halve as often as
    they do; transformers read patches of 2 x 2. Raises ModelError for a size that does not fit.
    """
    unit, (height, width) = factor, sides_of(size)
    if not isinstance(denoiser, UNet2DConditionModel):
        unit *= 2
    elif not set(denoiser.config.up_block_types[:-1]).issubset(TAKES_ANY):  # the last one stays
        unit *= 2**denoiser.num_upsamplers
    if height % unit or width % unit:
        raise ModelError(
            f"images of {said(size)} pixels do not fit {name}", f"use multiples of {unit}"
        )
    return height // factor, width // factor


def check_sizable(source: str, denoiser: Any, first_stage: Any) -> None:
    """Raise ModelError for a model without prompts that draws images of its own size alone: all
    but U-Nets in latents that are conditioned through attention."""
    if first_stage is None or not isinstance(denoiser, UNet2DConditionModel):
        raise ModelError(
            f"{source}: draws images of its own size alone",
            "leave sampling.image_size, height and width, and calibration.sizes out",
        )
