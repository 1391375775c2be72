"""Samples of two sets on the same seeds, pair by pair: how far apart they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..metrics.images_on_disk import CHUNK
from ..metrics.spread import Pairs
from .sample_set import SampleSet


def pair_up(full: SampleSet, quantized: SampleSet, rows: Sequence[int]) -> Pairs:
    """The pairs of these rows, which both sets have, read in chunks.

    Raises what reading images raises.
    """
    nothing = torch.empty(0, dtype=torch.float64)
    found = [Pairs(nothing, nothing.reshape(0, 2), nothing)]
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        seeds = [full.seeds[row] for row in chunk]
        images = full.images.take(chunk).read(), quantized.images.take(chunk).read()
        found.append(Pairs.of(images, (full.latents.of(seeds), quantized.latents.of(seeds))))
    return Pairs.joined(found)


def joined_pairs(parts: Sequence[Pairs], rows: Sequence[Sequence[int]]) -> Pairs:
    """All pairs of two sets from those of parts. rows: of each part, within the whole."""
    order = torch.tensor([row for part in rows for row in part]).argsort()
    found = Pairs.joined(parts)
    ssim = found.ssim[order] if len(found.ssim) else found.ssim
    return Pairs(found.errors[order], found.energies[order], ssim)
