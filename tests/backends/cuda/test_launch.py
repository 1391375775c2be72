"""Launches: codes in any order in memory, residuals, the next layer's codes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qncd_cli.backends.cuda import launch, layers
from qncd_cli.backends.onednn import input_scale_first
from qncd_cli.backends.reference import simulate
from qncd_cli.quant.affine import QParams, quantize
from qncd_cli.quant.smoothing import smooth
from qncd_cli.spec import activation_spec

from ..test_int8 import layer_of, random


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
        low, high = launch.quantize(x.unsqueeze(0), False, None, None, *range_, bits)
        expected = quantize(x, range_, activation_spec(bits))
        assert torch.equal(codes(low, high, bits)[0], expected)


def test_nan_becomes_the_zero_point():
    range_ = torch.tensor(0.1), torch.tensor(77, dtype=torch.int32)
    low, _ = launch.quantize(torch.tensor([[math.nan, 0.1]]), False, None, None, *range_, 8)
    assert codes(low, low, 8).tolist() == [[77, 78]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 16])
def test_images_in_any_order_become_rows_of_pixels(dtype, bits):
    """More channels and pixels than a tile; smoothed and shifted."""
    x = (random(2, 70, 9, 8) * 2).to(dtype)
    factor, shift = random(70, seed=1).abs() + 0.1, random(70, seed=2)
    range_ = QParams(torch.tensor(0.03), torch.tensor(100, dtype=torch.int32))
    smoothed = smooth(x.float(), factor, 1, shift)
    expected = quantize(smoothed, range_, activation_spec(bits)).permute(0, 2, 3, 1)
    wide = random(2, 70, 9, 16).to(dtype)
    wide[..., ::2] = x
    for image in (x, x.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        before = image.clone()
        low, high = launch.quantize(image, True, factor, shift, *range_, bits)
        assert torch.equal(codes(low, high, bits), expected)
        assert torch.equal(image, before)
        assert low.is_contiguous()


LAYERS = [
    (nn.Conv2d(20, 70, 3, padding=1, stride=2), (2, 20, 7, 6)),
    (nn.Conv2d(20, 33, 1), (2, 20, 5, 5)),
    (nn.Linear(40, 33), (2, 9, 40)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize(("original", "shape"), LAYERS, ids=[str(c[0]) for c in LAYERS])
def test_residual_and_the_next_layers_codes(original, shape, weight_bits, dtype):
    """As torch adds it and as the next layer quantizes it."""
    layer = layer_of(original, weight_bits)
    x = (random(*shape) * 2).to(dtype)
    y = simulate(layer, x)
    rows = y.permute(0, 2, 3, 1) if layer.is_conv else y
    residual = random(*rows.shape, seed=7).to(dtype)
    low, _ = launch.quantize(x, layer.is_conv, None, None, *layer.input_qparams(), 8)
    (weight,) = layers.prepare(layer)
    operands = (
        *(low, weight.codes, weight.zero_point, weight.scale, weight.sums, layer.bias),
        *(*layer.input_qparams(), layers.geometry(layer), dtype),
    )
    order = {"input_scale_first": input_scale_first()}
    added = launch.product(*operands, **order, residual=residual)
    assert added.dtype == dtype
    assert torch.equal(added, rows + residual)
    apart = torch.stack([residual, residual], -1)[..., 0]  # not in line in memory
    assert torch.equal(launch.product(*operands, **order, residual=apart), added)
    for factor, shift in [
        (None, None),
        (
            random(rows.shape[-1], seed=3).abs() + 0.2,
            rows[0, 0, 0].float() if layer.is_conv else rows[0, 0].float(),
        ),
    ]:
        range_ = QParams(torch.tensor(0.02), torch.tensor(90, dtype=torch.int32))
        after = launch.Next(*range_, 6, factor, shift)
        found = launch.product(*operands, **order, residual=residual, following=after)
        smoothed = (rows + residual).float()
        if factor is not None:
            smoothed = smooth(smoothed, factor, -1, shift)
        assert torch.equal(found.int() + 128, quantize(smoothed, range_, activation_spec(6)))


def test_both_kinds_of_kernels_live_side_by_side():
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    assert launch.interpreted()
    assert isinstance(launch.kernels(True).product, InterpretedFunction)
    assert isinstance(launch.kernels(False).product, JITFunction)
    assert launch.interpreted()
