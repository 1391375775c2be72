"""oneDNN's operators as torch has them, and in which order they scale integer sums on this machine.

sum * (input_scale * weight_scale) and (sum * input_scale) * weight_scale differ by one rounding
to float32. Kernels for AMX compute the first, those for AVX512-VNNI without it the second.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

OPERATORS = ("qconv_prepack", "qconv_pointwise", "qlinear_prepack", "qlinear_pointwise")
VECTORS, INPUTS, OUTPUTS = 64, 320, 128
"""Size of the product that is tried: cheap, yet large enough for the usual kernel."""


def output_as(dtype: torch.dtype) -> tuple[Any, ...]:
    """What the operators are told about their output: type, unscaled, nothing applied to it."""
    return (1.0, 0, dtype, "none", [], "")


def missing_operator() -> str:
    """An operator that this torch does not have; empty where it has all."""
    return next((name for name in OPERATORS if not hasattr(torch.ops.onednn, name)), "")


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
