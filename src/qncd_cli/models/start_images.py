"""Images that sampling begins from, and masks of what is painted anew, as latents.

The first stage's encoder gives a distribution of latents; its mean is taken, where pipelines of
diffusers draw from it: a latent is then the same for every sample and every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from ..errors import ModelError
from .prompt_length import Tell

BESIDE = "beside"
"""Argument of a denoiser whose channels stand beside those of its latents."""
ASPECT = 0.02
"""Relative difference between the shapes of an image and of what is drawn that is passed over."""
Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StartImages:
    """files: of images, one for each prompt in turn; masks: of none, of all, or one for each."""

    files: tuple[str, ...]
    masks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Started:
    """latents: [I, C, h, w] of the images; beside: [I, 1 + C, h, w], the mask (1 is painted anew)
    and the latents of the rest, None without masks."""

    latents: Tensor
    beside: Tensor | None

    def of(self, labels: Tensor) -> Tensor:
        """Latents that samples with these labels begin from."""
        return self.latents[labels.to(self.latents.device) % len(self.latents)]

    def condition(self, labels: Tensor) -> dict[str, Tensor]:
        """What the denoiser reads of the images, by argument."""
        if self.beside is None:
            return {}
        return {BESIDE: self.beside[labels.to(self.beside.device) % len(self.beside)]}


@torch.no_grad()
def started(
    pipeline: Any, request: StartImages, sides: tuple[int, int], encode: Encode, tell: Tell
) -> Started:
    """sides: height and width of what is drawn, in pixels. encode: images in [-1, 1] to latents.

    Images of the same shape and another size are resized as the pipeline does it, which is told.
    Raises ModelError for files that are no images, for images of another shape, and for masks that
    have not the size of their image.
    """
    images = [opened(file) for file in request.files]
    masks = [opened(file) for file in request.masks]
    for number, mask in enumerate(masks):
        for image, file in _of_mask(number, images, request):
            if mask.size != image.size:
                raise ModelError(
                    f"{request.masks[number]}: a mask of {_said(mask)} pixels, but {file} has "
                    f"{_said(image)}",
                    "give a mask of the image's size",
                )
    check_shapes(images, request.files, sides, "images", tell)
    size = {"height": sides[0], "width": sides[1]}
    pixels = [pipeline.image_processor.preprocess(image, **size) for image in images]
    latents = torch.cat([encode(one) for one in pixels])
    if not masks:
        return Started(latents, None)
    shown = [pipeline.mask_processor.preprocess(mask, **size) for mask in masks]
    beside = []
    for number, one in enumerate(pixels):
        mask = shown[number % len(shown)]
        small = F.interpolate(mask, size=latents.shape[2:]).to(latents)
        beside.append(torch.cat([small, encode(one * (mask < 0.5))], 1))
    return Started(latents, torch.cat(beside))


def check_shapes(
    images: Sequence[Image.Image],
    files: Sequence[str],
    sides: tuple[int, int],
    what: str,
    tell: Tell,
) -> None:
    """Raise ModelError for an image of another shape than the height and width that are drawn;
    tell hears how many are of another size. what: the images are."""
    for image, file in zip(images, files, strict=True):
        if abs(image.width * sides[0] / (image.height * sides[1]) - 1) > ASPECT:
            raise ModelError(
                f"{file}: {_said(image)} pixels, of another shape than the {sides[1]} x {sides[0]} "
                "that are drawn",
                "crop it, or set sampling.height and sampling.width",
            )
    resized = sum(image.size != sides[::-1] for image in images)
    if resized:
        tell(f"{resized} of {len(images)} {what} are resized to {sides[1]} x {sides[0]}")


def opened(file: str) -> Image.Image:
    """In colour. Raises ModelError for a file that is no image."""
    try:
        with Image.open(Path(file)) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise ModelError(f"{file}: is no image that can be read") from error


def _of_mask(
    number: int, images: Sequence[Image.Image], request: StartImages
) -> list[tuple[Image.Image, str]]:
    """The images, with their files, that a mask is laid over."""
    pairs = list(zip(images, request.files, strict=True))
    return pairs if len(request.masks) == 1 else pairs[number : number + 1]


def _said(image: Image.Image) -> str:
    return f"{image.width} x {image.height}"
