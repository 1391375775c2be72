"""Ends of a product: residuals, the next layer's codes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from qncd_cli.backends.cuda import layers
from qncd_cli.backends.cuda.product import Product, multiply
from qncd_cli.backends.cuda.quantize import Quantizer, quantize
from qncd_cli.backends.reference import simulate
from qncd_cli.quant import affine
from qncd_cli.quant.affine import QParams
from qncd_cli.quant.smoothing import smooth
from qncd_cli.spec import activation_spec

from ..test_int8 import layer_of, random

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
    range_ = layer.input_qparams()
    low, _ = quantize(x, layer.is_conv, Quantizer(*range_, 8))
    (weight,) = layers.prepare(layer)
    problem = Product(low, weight, layer.bias, *range_, layers.geometry(layer), dtype)
    with_residual = dataclasses.replace(problem, residual=residual)
    added = multiply(with_residual)
    assert added.dtype == dtype
    assert torch.equal(added, rows + residual)
    for factor, shift in [
        (None, None),
        (
            random(rows.shape[-1], seed=3).abs() + 0.2,
            rows[0, 0, 0].float() if layer.is_conv else rows[0, 0].float(),
        ),
    ]:
        range_ = QParams(torch.tensor(0.02), torch.tensor(90, dtype=torch.int32))
        after = Quantizer(*range_, 6, factor, shift)
        found = multiply(dataclasses.replace(with_residual, following=after))
        smoothed = (rows + residual).float()
        if factor is not None:
            smoothed = smooth(smoothed, factor, -1, shift)
        assert torch.equal(found.int() + 128, affine.quantize(smoothed, range_, activation_spec(6)))
