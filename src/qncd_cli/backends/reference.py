"""The simulate backend: what integer kernels compute, in floating point. The oracle; it is slower
than full precision.

Sums of products of integers are exact here as they are there, and scaled to float32 by the same
operations in the same order as oneDNN does it. A whole model computed twice would else part after
a few layers: a difference of one rounding moves a value to the next code, and that is as large as
the quantization error itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quant.affine import QParams, fake_quantize, round_to_codes
from ..quant.layers import QuantizedLayer
from ..spec import FLOAT_BITS
from .onednn import scale_sums, weight_parts

EXACT = 2.0**24
"""Below it float32 has every integer."""
PARTS, WEIGHT = "simulated parts", "simulated weight"
"""Names under which a layer keeps its integers in float32, and its dequantized weight."""
LARGEST_CODE = 255.0
"""Largest absolute value of a one-byte code less its zero-point."""


def simulate(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """x of any float dtype -> output of the same dtype; the arithmetic is float32."""
    spec = layer.input_spec
    if spec is None or layer.weight_bits == FLOAT_BITS:
        qparams = None if spec is None else layer.input_qparams()
        return simulate_with(layer, x, _float_weight(layer), layer.bias_now(), qparams)
    scale, zero_point = qparams = layer.input_qparams()
    codes = round_to_codes(layer.smoothed(x.to(torch.float32)), qparams, spec)
    inputs = [(codes, scale, zero_point)]
    if spec.bits > 8:  # two bytes, q = 256 high + low
        high = torch.floor(codes / 256)
        inputs = [
            (codes - 256 * high, scale, zero_point % 256),
            (high, 256 * scale, zero_point // 256),
        ]
    bias, output = layer.bias_now(), None
    for part, part_scale, part_zero_point in inputs:
        centred = part.sub_(part_zero_point)
        for weight in _weight_parts(layer):
            sums, weight_scale = _sums(layer, centred, weight), _per_channel(layer, weight.scale)
            scaled = scale_sums(sums, part_scale, weight_scale)
            if output is None:
                output = scaled if bias is None else scaled.add_(_per_channel(layer, bias))
            else:
                output.add_(scaled)
    assert output is not None
    if layer.is_conv:  # as oneDNN lays it out: a norm adds up in the order of memory
        output = output.contiguous(memory_format=torch.channels_last)
    return output.to(x.dtype)


def simulate_with(
    layer: QuantizedLayer, x: Tensor, weight: Tensor, bias: Tensor | None, qparams: QParams | None
) -> Tensor:
    """The layer on x with another weight, bias and input range; differentiable in all of them."""
    y = layer.smoothed(x.to(torch.float32))
    spec = layer.input_spec
    if spec is not None and qparams is not None:
        y = fake_quantize(y, qparams, spec)
    return _apply(layer, y, weight, bias).to(x.dtype)


def _apply(layer: QuantizedLayer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in the type of x and weight, autocast or not: 16 bits would round the sums."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _apply(layer, x, weight, bias)
    if layer.is_conv:
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.linear(x, weight, bias)


def _per_channel(layer: QuantizedLayer, values: Tensor) -> Tensor:
    """[O] -> to be broadcast to the layer's output."""
    return values.reshape(-1, 1, 1) if layer.is_conv else values


# ------------------------------------------------------------------ integer sums


@dataclass(frozen=True)
class _Part:
    """A weight of one byte: integers in float32, its scale [O], and the largest sum of products
    that it can take part in, whole and in nibbles."""

    weight: Tensor
    scale: Tensor
    reach: float
    reach_in_nibbles: float


def _sums(layer: QuantizedLayer, x: Tensor, part: _Part) -> Tensor:
    """x times the weight, both integers in float32: exact, then rounded to float32."""
    if part.reach < EXACT:
        return _apply(layer, x, part.weight)
    if part.reach_in_nibbles < EXACT:
        high, low = _nibbles(part.weight)
        return (16 * _apply(layer, x, high).double() + _apply(layer, x, low)).float()
    return _apply(layer, x.double(), part.weight.double()).float()


def _nibbles(weight: Tensor) -> tuple[Tensor, Tensor]:
    """w = 16 high + low, low from 0 to 15."""
    high = torch.floor(weight / 16)
    return high, weight - 16 * high


def _weight_parts(layer: QuantizedLayer) -> list[_Part]:
    """Those of `weight_parts`; made once per layer and kept beside its codes, unless memory is
    dear."""
    parts: list[_Part] | None = layer.prepared.get(PARTS)
    if parts is None or parts[0].weight.device != layer.weight.device:
        integers = layer.integer_weight(), layer.weight_scale
        parts = [_part(*part) for part in weight_parts(*integers, layer.activation_bits)]
        if not layer.low_memory:
            layer.prepared[PARTS] = parts
    return parts


def _part(weight: Tensor, scale: Tensor) -> _Part:
    """weight: int8 [O, ...]; scale: [O]."""
    weight = weight.float()
    nibbles = max(_reach(nibble) for nibble in _nibbles(weight))
    return _Part(weight, scale, _reach(weight), nibbles)


def _reach(weight: Tensor) -> float:
    """The largest sum that an output of this weight can come to with codes of one byte."""
    return LARGEST_CODE * float(weight.abs().flatten(1).sum(1).max())


def forget_weight(layer: QuantizedLayer) -> None:
    """Free what is kept of the layer's weight; to be called where its codes have changed."""
    for name in (PARTS, WEIGHT):
        layer.prepared.pop(name, None)


def _float_weight(layer: QuantizedLayer) -> Tensor:
    """Dequantized once per layer and kept beside its codes, unless memory is dear."""
    if layer.low_memory:
        return layer.float_weight()
    weight: Tensor | None = layer.prepared.get(WEIGHT)
    if weight is None or weight.device != layer.weight.device:
        weight = layer.float_weight()
        layer.prepared[WEIGHT] = weight
    return weight
