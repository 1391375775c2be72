"""Structural similarity of pairs of images.

Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural
similarity": a Gaussian window of 11 pixels, where it lies inside the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
LUMINANCE, CONTRAST = (0.01 * 255) ** 2, (0.03 * 255) ** 2
IMAGES_PER_CHUNK = 64


def ssim_each(reference: Tensor, other: Tensor) -> list[float] | None:
    """SSIM of every pair, the mean over the channels, from -1 to 1 (equal images).

    reference, other: uint8 [N, C, H, W]. Returns N numbers, None for images smaller than the
    window. Raises ValueError if the shapes differ.
    """
    if tuple(reference.shape) != tuple(other.shape):
        raise ValueError(f"shapes {list(reference.shape)} and {list(other.shape)} differ")
    if min(reference.shape[-2:]) < WINDOW:
        return None
    found: list[float] = []
    chunks = (images.split(IMAGES_PER_CHUNK) for images in (reference, other))
    for a, b in zip(*chunks, strict=True):
        if (a == a[:, :1]).all() and (b == b[:, :1]).all():  # grey: one channel says all
            a, b = a[:, :1], b[:, :1]
        found += _similarity(a.cpu().to(torch.float64), b.cpu().to(torch.float64)).tolist()
    return found


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """float64 [N, C, H, W] twice -> [N]."""
    mean_a, mean_b = _blurred(a), _blurred(b)
    square_a, square_b, both = mean_a.square(), mean_b.square(), mean_a * mean_b
    spread = _blurred(a.square() + b.square()) - square_a - square_b
    covariance = _blurred(a * b) - both
    luminance = (2 * both + LUMINANCE) / (square_a + square_b + LUMINANCE)
    structure = (2 * covariance + CONTRAST) / (spread + CONTRAST)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blurred(images: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, H - 10, W - 10]."""
    offsets = torch.arange(WINDOW, dtype=images.dtype) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    taps = (weights / weights.sum()).tolist()
    for axis in (2, 3):
        size = images.shape[axis] - WINDOW + 1
        parts = (tap * images.narrow(axis, i, size) for i, tap in enumerate(taps))
        images = sum(parts, start=torch.zeros(1, dtype=images.dtype))
    return images
