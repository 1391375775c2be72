"""Weights as the kernels read them: an output's taps one after the other, channels in line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...quant.layers import QuantizedLayer
from ...quant.packing import unpack, weight_bytes
from ..onednn import input_scale_first
from .tiles import TAP_CHANNELS

NIBBLE_BITS = 4
"""Codes of at most so many bits stay two to a byte."""


@dataclass(frozen=True)
class Weight:
    """codes: int8 [O, taps, C'], or uint8 [O, taps, C' / 2] with zero_point int8 [O]: two codes a
    byte, in groups of TAP_CHANNELS channels, of which the first half lies in the low nibbles.
    C': the channels, filled up to groups. scale [O] float32; sums [taps, O] int32, over channels.
    input_scale_first: how sums are scaled on this machine, looked up before a graph is traced.
    """

    codes: Tensor
    zero_point: Tensor | None
    scale: Tensor
    sums: Tensor
    input_scale_first: bool

    @property
    def packed(self) -> bool:
        """Whether a byte holds two codes."""
        return self.codes.dtype == torch.uint8


def prepared(layer: QuantizedLayer) -> list[Weight]:
    """The layer's weight in bytes: one, or two for weights of two bytes."""
    integers, first = layer.integer_weight(), input_scale_first()
    if layer.weight_bits > NIBBLE_BITS:
        parts = weight_bytes(integers, layer.weight_scale)
        return [Weight(_filled(part), None, scale, _sums(part), first) for part, scale in parts]
    codes = unpack(layer.weight, layer.weight_bits, layer.weight_shape, torch.uint8)
    zero_point = layer.weight_zero_point
    if zero_point is None:
        zero_point = torch.zeros(len(codes), device=codes.device)
    halves = _filled(codes).unflatten(2, (-1, 2, TAP_CHANNELS // 2))
    pairs = (halves[:, :, :, 0] | (halves[:, :, :, 1] << 4)).flatten(2).contiguous()
    return [Weight(pairs, zero_point.to(torch.int8), layer.weight_scale, _sums(integers), first)]


def _by_tap(weight: Tensor) -> Tensor:
    """[O, C, ...] -> [O, taps, C]"""
    return weight.flatten(2).transpose(1, 2) if weight.ndim > 2 else weight.unsqueeze(1)


def _filled(weight: Tensor) -> Tensor:
    """[O, C, ...] -> [O, taps, C'] with zeros behind the channels."""
    by_tap = _by_tap(weight)
    return F.pad(by_tap, (0, -by_tap.shape[2] % TAP_CHANNELS)).contiguous()


def _sums(weight: Tensor) -> Tensor:
    """[O, C, ...] -> [taps, O] int32."""
    return _by_tap(weight).sum(2, dtype=torch.int32).T.contiguous()
