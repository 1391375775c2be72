"""Convolutions of images whose pixels were doubled, computed from the image as it was before.

diffusers upsamples so before a convolution (nearest neighbour, twice the size): every pixel comes
four times under a 3x3 kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...quant.layers import QuantizedLayer
from .. import int8
from ..onednn import largest_weight, weight_parts, writes_bfloat16


def doubles(layer: QuantizedLayer) -> bool:
    """Whether `prepare` can do so for the layer: sums of four weights, which may be as large as the
    largest code, have to be weights themselves."""
    plain = layer.is_conv and layer.weight_shape[2:] == (3, 3) and int8.why_not(layer) == ""
    if not plain or 4 * (2**layer.weight_bits - 1) > largest_weight(layer.activation_bits):
        return False
    return int8.geometry(layer) == ([1, 1], [1, 1], [1, 1], 1)


def prepare(layer: QuantizedLayer, low: Tensor, dtype: torch.dtype) -> int8.Kernel:
    """int8.prepare for codes of the image before its pixels were doubled in either direction.

    Of the nine weights those meet in one product which fall on one pixel: for each of the four
    places within a doubled pixel a kernel of 2x2 (weights [4 O, C, 2, 2]), four ninths of the
    products in all, with the layer's own stride and padding. The sums are the same integers.
    """
    weight = layer.integer_weight().to(torch.int16)
    rows = torch.stack([_paired(weight, 2, place) for place in (0, 1)])
    places = [_paired(part, 3, place) for part in rows for place in (0, 1)]
    doubled, scale = torch.cat(places).to(torch.int8), layer.weight_scale.repeat(4)
    parts = weight_parts(doubled, scale, layer.activation_bits)  # a graph may be of another CPU
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    return int8.Kernel(
        [(int8.prepacked(layer, low, part, of_part), of_part) for part, of_part in parts],
        zeros,
        int8.geometry(layer),
        rounds=dtype == torch.bfloat16 and writes_bfloat16(),
        upsampled=True,
    )


def _paired(weight: Tensor, dim: int, place: int) -> Tensor:
    """Three weights along dim to the two that a first (0) or second (1) half of a pixel meets."""
    first, middle, last = weight.unbind(dim)
    pair = (first, middle + last) if place == 0 else (first + middle, last)
    return torch.stack(pair, dim)
