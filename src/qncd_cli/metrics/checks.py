"""What is wrong with images before any number is taken from them."""

from __future__ import annotations

from torch import Tensor


def flat_images(images: Tensor) -> dict[int, tuple[int, ...]]:
    """Images of one colour: row -> that colour, a value for each channel.

    images: uint8 [N, C, H, W]. All zeros is black.
    """
    pixels = images.flatten(2)  # [N, C, H * W]
    low, high = pixels.amin(2), pixels.amax(2)
    flat = (low == high).all(1).nonzero().flatten().tolist()
    return {row: tuple(low[row].tolist()) for row in flat}


def not_finite(values: Tensor) -> dict[int, int]:
    """Samples that hold NaN or infinity: row -> how many. values: [N, ...] float."""
    counts = (~values.isfinite()).flatten(1).sum(1).tolist()
    return {row: count for row, count in enumerate(counts) if count}
