"""Layers whose input stays in floating point: weights of bytes and half bytes in the kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qncd_cli.backends.cuda import layers, ops
from qncd_cli.backends.reference import simulate
from qncd_cli.quant.layers import QuantizedLayer
from qncd_cli.spec import FLOAT_BITS

from ..test_int8 import CASES, layer_of, random

KERNELS = [case for case in CASES if getattr(case[0], "groups", 1) == 1]
SUMS, HALF_A_STEP = 2e-6, {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Of float32 sums in another order, as a part of the largest output; of the output's own type."""


def check(layer: QuantizedLayer, x: Tensor) -> None:
    """Products are exact, as the integers are: nothing but sums and the output is rounded."""
    assert layers.why_not(layer) == ""
    with torch.no_grad():
        found, expected = layers.compute(layer, x), simulate(layer, x.float())
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    bound = SUMS * expected.abs().max() + HALF_A_STEP[x.dtype] * expected.abs()
    assert bool(((found.float() - expected).abs() <= bound).all())


@pytest.mark.parametrize(("original", "shape"), KERNELS, ids=[str(c[0]) for c in KERNELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer(original, shape, dtype, bits):
    layer = layer_of(original, bits, FLOAT_BITS)
    x = (random(*shape) * 2).to(dtype)
    check(layer, x)
    if layer.is_conv:
        check(layer, x.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("bits", [2, 3, 6, 15])
def test_other_widths(bits):
    """More channels than a group of nibbles, and than a tile has outputs."""
    check(layer_of(nn.Linear(70, 65), bits, FLOAT_BITS), random(5, 70).half())


def test_smoothed_and_shifted_inputs_are_multiplied_in_float32():
    extras = {"smoothing": random(6, seed=3).abs() + 0.2, "shift": random(6, seed=4)}
    for original, shape in ((nn.Linear(6, 5), (3, 6)), (nn.Conv2d(6, 5, 3), (2, 6, 5, 4))):
        check(layer_of(original, 4, FLOAT_BITS, **extras), random(*shape).bfloat16())


def test_four_bits_stay_four_in_memory():
    layer = layer_of(nn.Linear(64, 32), 4, FLOAT_BITS)
    layers.compute(layer, random(3, 64).half())
    (kept,) = layer.prepared[layers.KERNEL]
    assert kept.codes.nbytes == layer.weight.nbytes == 64 * 32 // 2
    assert [*layer.prepared] == [layers.KERNEL]


def test_no_rows_and_the_rules_of_operators():
    layer = layer_of(nn.Conv2d(6, 5, 3, padding=1), 4, FLOAT_BITS)
    assert layers.compute(layer, random(0, 6, 4, 4)).shape == (0, 5, 4, 4)
    (weight,) = layers.prepare(layer)
    parts = weight.codes, weight.zero_point, weight.scale, weight.sums, layer.bias
    operands = (random(2, 4, 5, 6).half(), *parts, layers.geometry(layer), torch.float16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.FLOAT_PRODUCT, operands, test_utils=tests)
    a, b = torch.ones(2, 3, 4, dtype=torch.int8), torch.ones(2, 4, 5, dtype=torch.int8)
    torch.library.opcheck(ops.BYTE_MATMUL, (a, b), test_utils=tests)
