"""Intra-noise correction: channel-wise smoothing factors derived from the timestep embedding.

conv(h, W) = conv(h / S, W * S) for any S > 0 (per input channel). S is chosen so that the
channels that the timestep embedding widens are narrowed again before they meet one scale per
tensor (QNCD, arXiv 2403.19140, sec. 4.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .rotation import ROTATIONS, rotate

MAX_RATIO = 16.0
"""A factor stays within this ratio of the median of its layer's factors."""
TINY = 1e-12
"""Floor of a magnitude, as a share of the largest in its layer."""


class SmoothingFactor(NamedTuple):
    """factor: [C] float32, positive and finite; clamped: how many channels were clamped.

    shift: [C] taken off before the division, None for none. Its product with the weight goes
    into the bias, so that it costs an integer kernel nothing (pointwise layers only: elsewhere
    it would move the padding). rotation: channels of a group that is rotated before all else
    (`rotation`), 0 for none; linear layers only.
    """

    factor: Tensor
    clamped: int
    shift: Tensor | None = None
    rotation: int = 0

    def apply(self, x: Tensor, channel_axis: int) -> Tensor:
        """(x H - shift) / S along the channels: what the layer reads."""
        if self is IDENTITY:
            return x
        return smooth(self._rotated(x), self.factor, channel_axis, self.shift)

    def scaled_back(self, x: Tensor, channel_axis: int) -> Tensor:
        """x * S H along the channels: a difference of smoothed inputs, in the input's own units."""
        if self is IDENTITY:
            return x
        return self._rotated(smooth(x, 1 / self.factor, channel_axis))

    def fold(self, weight: Tensor) -> Tensor:
        """W H * S along the input channels: what the layer multiplies with."""
        return weight if self is IDENTITY else fold(self._rotated(weight), self.factor)

    def unfold(self, weight: Tensor) -> Tensor:
        """W / S H along the input channels: fold taken back."""
        return weight if self is IDENTITY else self._rotated(fold(weight, 1 / self.factor))

    def _rotated(self, x: Tensor) -> Tensor:
        """x H along the last axis; H is its own inverse."""
        return rotate(x, self.rotation) if self.rotation else x

    def bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The layer's bias with what the shift takes off. weight: before fold."""
        return bias if self.shift is None else shifted_bias(weight, bias, self.shift)

    def tensors(self) -> dict[str, Tensor]:
        """What artifacts hold of it beside a layer's name; nothing of the identity."""
        if self is IDENTITY:
            return {}
        found = {"smoothing": self.factor}
        if self.shift is not None:
            found["shift"] = self.shift
        if self.rotation:
            found["rotation"] = torch.tensor([self.rotation], dtype=torch.int32)
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], clamped: int = 0) -> SmoothingFactor:
        """What `tensors` gave. Raises ValueError for a rotation that there is not."""
        group = int(tensors["rotation"]) if "rotation" in tensors else 0
        channels = len(tensors["smoothing"])
        if group and (group not in ROTATIONS or channels % group):
            raise ValueError(f"no rotation of {channels} channels in groups of {group}")
        return cls(tensors["smoothing"], clamped, tensors.get("shift"), group)


IDENTITY = SmoothingFactor(torch.ones(1), 0)
"""The factor of layers that have none, for any number of channels: it returns what it is given."""


def clamp_factor(raw: Tensor) -> SmoothingFactor:
    """Make any vector a valid factor: |raw|, finite, within MAX_RATIO of its median.

    Published code lets negative signs through; a factor of 0 would divide by zero.
    """
    magnitude = torch.nan_to_num(raw.detach().abs().to(torch.float32), nan=1.0, posinf=1e12)
    centre = _floored(magnitude).median()
    factor = magnitude.clamp(centre / MAX_RATIO, centre * MAX_RATIO)
    return SmoothingFactor(factor, int((factor != magnitude).sum()))


def _floored(magnitude: Tensor) -> Tensor:
    """Magnitudes without zeros, relative to the largest; ones where all are zero."""
    largest = magnitude.max()
    return torch.where(largest > 0, magnitude.clamp(min=TINY * largest), torch.ones_like(magnitude))


def embedding_factor(
    embedding: Tensor, gamma: Tensor | None, num_groups: int, eps: float = 1e-5
) -> SmoothingFactor:
    """S = |gamma| * mean over steps of max(e_t, 1), e_t = GroupNorm without affine of emb_t.

    embedding: [S, C] what the block adds to its features at each of S steps of the sampler (in a
    scale-shift block: the scale half); gamma: [C] weight of the block's second norm (ones when
    None); num_groups: of that norm. Returns [C]. Source: docs/method.md.
    """
    e = F.group_norm(embedding.to(torch.float32), num_groups, eps=eps)
    factor = e.clamp(min=1).mean(0)
    if gamma is not None:
        factor = gamma.detach().abs().to(torch.float32) * factor
    return clamp_factor(factor)


def modulation_factor(scale: Tensor) -> SmoothingFactor:
    """S = mean over steps of |1 + scale_t|, for features LayerNorm(x) * (1 + scale_t) + shift_t.

    scale: [S, C] of an adaptive layer norm at each of S steps (and classes). Returns [C].
    The analogue of the embedding factor in transformers (docs/method.md), not in the paper.
    """
    return clamp_factor((1 + scale.to(torch.float32)).abs().mean(0))


def smoothquant_factor(channel_absmax: Tensor, weight: Tensor, strength: float) -> SmoothingFactor:
    """S_c = max|h_c|^a / max|W_c|^(1 - a); SmoothQuant, arXiv 2211.10438, eq. 4.

    channel_absmax: [C] of the layer's input on calibration data; weight: [O, C, ...];
    strength: a in [0, 1], how much of the difficulty moves from activations to weights.
    """
    weight_absmax = weight.detach().abs().to(torch.float32).movedim(1, 0).flatten(1).amax(1)
    h = _floored(channel_absmax.to(torch.float32)) ** strength
    return clamp_factor(h / _floored(weight_absmax) ** (1 - strength))


def range_factor(
    channel_min: Tensor, channel_max: Tensor, strength: float, *, shifted: bool
) -> SmoothingFactor:
    """S_c = r_c^a, r_c half the width of channel c's range (its largest magnitude unshifted).

    At a = 1 every channel fills the range of the tensor: per-channel activation scales, folded
    into the weights. shifted: centre each channel first (Outlier Suppression+, arXiv 2304.09145).
    channel_min, channel_max: [C] on calibration data; strength: a in [0, 1].
    """
    low, high = channel_min.to(torch.float32), channel_max.to(torch.float32)
    if not shifted:
        return clamp_factor(_floored(torch.maximum(-low, high)) ** strength)
    shift = low / 2 + high / 2  # halves first: their sum stays finite
    shift = torch.where(torch.isfinite(shift), shift, 0)
    return clamp_factor(_floored(high / 2 - low / 2) ** strength)._replace(shift=shift)


def split_factor(channel_min: Tensor, channel_max: Tensor, boundary: int) -> SmoothingFactor:
    """One factor for each of two concatenated tensors, so that both fill one range.

    Split quantization of a skip connection (Q-Diffusion, arXiv 2302.04304, sec. 4.3) as a
    per-input-channel factor: two scales, folded into the weights. boundary: channels of the
    first tensor. Equal ranges give equal factors, which change nothing.
    """
    magnitude = torch.maximum(-channel_min, channel_max).to(torch.float32)
    factor = torch.empty_like(magnitude)
    factor[:boundary] = magnitude[:boundary].max()
    factor[boundary:] = magnitude[boundary:].max()
    return clamp_factor(factor / _floored(factor).max())


def smooth(x: Tensor, factor: Tensor, channel_axis: int, shift: Tensor | None = None) -> Tensor:
    """(x - shift) / S along the channels."""
    shape = [1] * x.ndim
    shape[channel_axis] = -1
    if shift is not None:
        x = x - shift.to(x).reshape(shape)
    return x / factor.to(x).reshape(shape)


def shifted_bias(weight: Tensor, bias: Tensor | None, shift: Tensor) -> Tensor:
    """bias + W m: what the layer adds when m was taken off its input. weight [O, C, ...]."""
    product = weight.flatten(1) @ shift.to(weight)  # pointwise: one value per channel
    return product if bias is None else bias + product


def fold(weight: Tensor, factor: Tensor) -> Tensor:
    """W * S along the input channels; weight [O, C, ...], factor [C]. Returns a new tensor."""
    return weight * factor.reshape(1, -1, *[1] * (weight.ndim - 2))
