"""Intra-noise correction: channel-wise smoothing factors derived from the timestep embedding.

conv(h, W) = conv(h / S, W * S) for any S > 0 (per input channel). S is chosen so that the
channels that the timestep embedding widens are narrowed again before they meet one scale per
tensor (QNCD, arXiv 2403.19140, sec. 4.1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_RATIO = 16.0
"""A factor stays within this ratio of the median of its layer's factors."""
TINY = 1e-12


class SmoothingFactor(NamedTuple):
    """factor: [C] float32, positive and finite; clamped: how many channels were clamped."""

    factor: Tensor
    clamped: int


def clamp_factor(raw: Tensor) -> SmoothingFactor:
    """Make any vector a valid factor: |raw|, finite, within MAX_RATIO of its median.

    Published code lets negative signs through; a factor of 0 would divide by zero.
    """
    magnitude = torch.nan_to_num(raw.detach().abs().to(torch.float32), nan=1.0, posinf=1e12)
    centre = magnitude.clamp(min=TINY).median()
    factor = magnitude.clamp(centre / MAX_RATIO, centre * MAX_RATIO)
    return SmoothingFactor(factor, int((factor != magnitude).sum()))


def embedding_factor(
    embedding: Tensor, gamma: Tensor | None, num_groups: int, eps: float = 1e-5
) -> SmoothingFactor:
    """S = |gamma| * mean over steps of max(e_t, 1), e_t = GroupNorm without affine of emb_t.

    embedding: [S, C] what the block adds to its features at each of S steps of the sampler (in a
    scale-shift block: the scale half); gamma: [C] weight of the block's second norm (ones when
    None); num_groups: of that norm. Returns [C]. method.md section 2.
    """
    e = F.group_norm(embedding.to(torch.float32), num_groups, eps=eps)
    factor = e.clamp(min=1).mean(0)
    if gamma is not None:
        factor = gamma.detach().abs().to(torch.float32) * factor
    return clamp_factor(factor)


def fold(weight: Tensor, factor: Tensor) -> Tensor:
    """W * S along the input channels; weight [O, C, ...], factor [C]. Returns a new tensor."""
    return weight * factor.reshape(1, -1, *[1] * (weight.ndim - 2))
