"""Codes of inputs in any order in memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qncd_cli.backends.cuda.quantize import Quantizer, quantize
from qncd_cli.quant import affine
from qncd_cli.quant.affine import QParams
from qncd_cli.quant.smoothing import smooth
from qncd_cli.spec import activation_spec

from ..test_int8 import random


def codes(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """What the bytes stand for, int32."""
    found = low.int() + 128
    return found + 256 * (high.int() + 128) if bits > 8 else found


@pytest.mark.parametrize("bits", [2, 8, 9, 16])
@pytest.mark.parametrize("scale", [1.0, 0.037, 3.1e-4])
def test_codes_are_those_of_the_oracle(bits, scale):
    """Ties, both ends, both zeros, infinities; several zero-points."""
    halves = torch.arange(-600, 601) / 2
    ends = torch.tensor([-0.0, 1e30, -1e30, math.inf, -math.inf])
    x = torch.cat([halves * scale, random(2000) * 2**bits * scale, ends])
    for zero in (0, 1, 2 ** (bits - 1), 2**bits - 1):
        range_ = QParams(torch.tensor(scale), torch.tensor(zero, dtype=torch.int32))
        low, high = quantize(x.unsqueeze(0), False, Quantizer(*range_, bits))
        expected = affine.quantize(x, range_, activation_spec(bits))
        assert torch.equal(codes(low, high, bits)[0], expected)


def test_nan_becomes_the_zero_point():
    range_ = torch.tensor(0.1), torch.tensor(77, dtype=torch.int32)
    low, _ = quantize(torch.tensor([[math.nan, 0.1]]), False, Quantizer(*range_, 8))
    assert codes(low, low, 8).tolist() == [[77, 78]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 16])
def test_images_in_any_order_become_rows_of_pixels(dtype, bits):
    """More channels and pixels than a tile; smoothed and shifted."""
    x = (random(2, 70, 9, 8) * 2).to(dtype)
    factor, shift = random(70, seed=1).abs() + 0.1, random(70, seed=2)
    range_ = QParams(torch.tensor(0.03), torch.tensor(100, dtype=torch.int32))
    smoothed = smooth(x.float(), factor, 1, shift)
    expected = affine.quantize(smoothed, range_, activation_spec(bits)).permute(0, 2, 3, 1)
    wide = random(2, 70, 9, 16).to(dtype)
    wide[..., ::2] = x
    for image in (x, x.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        before = image.clone()
        low, high = quantize(image, True, Quantizer(*range_, bits, factor, shift))
        assert torch.equal(codes(low, high, bits), expected)
        assert torch.equal(image, before)
        assert low.is_contiguous()
