"""The best rates that this CPU reaches: one large product of each kind, with nothing around it.

What a row of the bench is measured against. The products have shapes that U-Nets and transformers
contain, and go through the operators that would compute a layer: PyTorch's own for floating
point, those of the int8 backend for integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .onednn import output_as

FLOAT_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHANNELS, SIDE, IMAGES = 256, 64, 2  # of the 3 x 3 convolution
LENGTH, WIDTH = 4096, 1024  # of the matrix product [LENGTH, WIDTH] x [WIDTH, WIDTH]
GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)  # stride, padding, dilation, groups


@dataclass(frozen=True)
class Microbenchmark:
    """One product; operations: multiplications and additions of one call."""

    name: str
    operations: int
    call: Callable[[], Tensor]


def microbenchmarks(arithmetic: str) -> list[Microbenchmark]:
    """A convolution and a matrix product in float32, bfloat16 or int8."""
    if arithmetic in FLOAT_TYPES:
        dtype = FLOAT_TYPES[arithmetic]
        conv, linear = _float_conv(dtype), _float_linear(dtype)
    else:
        conv, linear = _int8_conv(), _int8_linear()
    macs = IMAGES * SIDE * SIDE * CHANNELS * CHANNELS * 9
    return [
        Microbenchmark(f"{arithmetic} convolution", 2 * macs, conv),
        Microbenchmark(f"{arithmetic} matrix product", 2 * LENGTH * WIDTH * WIDTH, linear),
    ]


def _float_conv(dtype: torch.dtype) -> Callable[[], Tensor]:
    x = torch.ones(IMAGES, CHANNELS, SIDE, SIDE, dtype=dtype)
    weight = torch.ones(CHANNELS, CHANNELS, 3, 3, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(x, weight, padding=1)


def _float_linear(dtype: torch.dtype) -> Callable[[], Tensor]:
    x, weight = torch.ones(LENGTH, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
    return lambda: F.linear(x, weight)


def _int8_conv() -> Callable[[], Tensor]:
    shape = (IMAGES, CHANNELS, SIDE, SIDE)
    x = torch.ones(shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(CHANNELS, CHANNELS, 3, 3, dtype=torch.int8)
    scale, zeros = torch.ones(CHANNELS), torch.zeros(CHANNELS, dtype=torch.int64)
    packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, *GEOMETRY, list(shape))
    operands = (x, 1.0, 0, packed, scale, zeros, None, *GEOMETRY, *output_as(torch.float32))
    return lambda: torch.ops.onednn.qconv_pointwise(*operands)


def _int8_linear() -> Callable[[], Tensor]:
    x, weight = (
        torch.ones(LENGTH, WIDTH, dtype=torch.uint8),
        torch.ones(WIDTH, WIDTH).to(torch.int8),
    )
    scale, zeros = torch.ones(WIDTH), torch.zeros(WIDTH, dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(weight, [LENGTH, WIDTH])
    operands = (x, 1.0, 0, packed, scale, zeros, None, *output_as(torch.float32))
    return lambda: torch.ops.onednn.qlinear_pointwise(*operands)
