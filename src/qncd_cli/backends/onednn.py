"""oneDNN's operators as torch has them, and what they do on this machine.

Order of scales: sum * (input_scale * weight_scale) and (sum * input_scale) * weight_scale differ by
one rounding to float32. Kernels for AMX and for AVX2 compute the first, those for AVX512-VNNI
without AMX the second.

Saturation: CPUs without VNNI add two products of a code and a weight in int16 before anything else.
These sums are exact for weights up to 64, as 2 * 255 * 64 < 2^15, or codes of 7 bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..quant.packing import NARROW, NARROW_INPUT_BITS, narrow_bytes, weight_bytes

OPERATORS = ("qconv_prepack", "qconv_pointwise", "qlinear_prepack", "qlinear_pointwise")
WIDE = 127
"""Largest weight of a byte."""
VECTORS, INPUTS, OUTPUTS = 64, 320, 128
"""Size of the product that is tried: cheap, yet large enough for the usual kernel."""


def output_as(dtype: torch.dtype) -> tuple[Any, ...]:
    """What the operators are told about their output: type, unscaled, nothing applied to it."""
    return (1.0, 0, dtype, "none", [], "")


def missing_operator() -> str:
    """An operator that this torch does not have; empty where it has all."""
    return next((name for name in OPERATORS if not hasattr(torch.ops.onednn, name)), "")


@functools.cache
def why_unusable() -> str:
    """Why no layer can be computed by these operators on this CPU; empty where they can."""
    if name := missing_operator():
        return f"this torch has no operator onednn.{name}"
    if not torch.cpu._is_avx2_supported():  # reference code that takes minutes for a step
        return "oneDNN has no fast 8-bit products for a CPU without AVX2"
    try:
        exact = _products_are_exact(NARROW)
    except RuntimeError:
        return "oneDNN has no 8-bit products for this CPU"
    return "" if exact else "oneDNN's 8-bit products are not exact on this CPU"


@functools.cache
def saturates() -> bool:
    """Whether sums of products go wrong here with weights of 8 bits, though not with fewer."""
    return why_unusable() == "" and not _products_are_exact(WIDE)


def largest_weight(input_bits: int) -> int:
    """The largest absolute value of an int8 weight that these operators take exactly here, with an
    input of that many bits."""
    return NARROW if saturates() and input_bits > NARROW_INPUT_BITS else WIDE


def writes_bfloat16() -> bool:
    """Whether these operators write bfloat16 by kernels of their own. Without AVX-512, or held back
    to less, they have only reference code for that, which is slow and rounds otherwise."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not saturates()


def weight_parts(weight: Tensor, scale: Tensor, input_bits: int) -> list[tuple[Tensor, Tensor]]:
    """An integer weight [O, ...] with its scale [O] in what these operators take exactly with an
    input of that many bits: int8 weights, each with a scale [O], whose sum is the weight."""
    narrow = weight.device.type == "cpu" and largest_weight(input_bits) < WIDE
    return narrow_bytes(weight, scale) if narrow else weight_bytes(weight, scale)


def _products_are_exact(largest: int) -> bool:
    """Both operators on codes of 255 and weights that large: every sum of 64 products."""
    ones, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int64)
    x = torch.full((4, 64), 255, dtype=torch.uint8)
    weight = torch.full((16, 64), largest, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [4, 64])
    output = output_as(torch.float32)
    linear = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, packed, ones, zeros, None, *output)
    image = x.reshape(4, 64, 1, 1).contiguous(memory_format=torch.channels_last)
    kernel, geometry = weight.reshape(16, 64, 1, 1), ([1, 1], [0, 0], [1, 1], 1)
    packed = torch.ops.onednn.qconv_prepack(kernel, ones, 1.0, 0, *geometry, [4, 64, 1, 1])
    conv = torch.ops.onednn.qconv_pointwise(
        image, 1.0, 0, packed, ones, zeros, None, *geometry, *output
    )
    exact = 64 * 255 * largest
    return bool((linear == exact).all() and (conv == exact).all())


def scale_sums(sums: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Sums (float32, overwritten) times both scales, in the order of this machine's kernels.

    input_scale: one number; weight_scale: broadcast to the sums.
    """
    if input_scale_first():
        return sums.mul_(input_scale).mul_(weight_scale)
    return sums.mul_(input_scale * weight_scale)


@functools.cache
def input_scale_first() -> bool:
    """Whether the input's scale is multiplied first here: found out by one product; False where
    there is no such operator."""
    if missing_operator():
        return False
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (VECTORS, INPUTS), generator=draw, dtype=torch.uint8)
    weight = torch.randint(-8, 8, (OUTPUTS, INPUTS), generator=draw, dtype=torch.int8)
    input_scale, weight_scale = torch.tensor(0.0123), torch.rand(OUTPUTS, generator=draw)
    zeros = torch.zeros(OUTPUTS, dtype=torch.int64)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, list(codes.shape))
        operands = (codes, float(input_scale), 0, packed, weight_scale, zeros, None)
        output = torch.ops.onednn.qlinear_pointwise(*operands, *output_as(torch.float32))
    except RuntimeError:  # a processor for which oneDNN has no such kernel
        return False
    sums = codes.float() @ weight.float().T
    return torch.equal(output, sums * input_scale * weight_scale)
