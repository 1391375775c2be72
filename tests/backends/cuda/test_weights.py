"""Weights as the kernels read them hold the layer's integers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qncd_cli.backends.cuda.weights import prepared

from ..test_int8 import layer_of

LAYERS = [nn.Conv2d(70, 5, (3, 2)), nn.Conv2d(64, 3, 1), nn.Linear(130, 4), nn.Linear(1, 1)]


@pytest.mark.parametrize("original", LAYERS, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 15])
def test_the_integers_come_back(original, bits):
    layer = layer_of(original, bits)
    by_output = layer.integer_weight().flatten(1).int()
    expected = by_output.unflatten(1, (original.weight.shape[1], -1)).transpose(1, 2)
    found = torch.zeros_like(expected)
    for part in prepared(layer):
        integers = part.codes.int()
        if bits <= 4:
            assert part.codes.dtype == torch.uint8
            groups = part.codes.unflatten(2, (-1, 32))
            codes = torch.stack([groups & 15, groups >> 4], 3).flatten(2)
            integers = codes.int() - part.zero_point.int()[:, None, None]
        else:
            assert part.codes.dtype == torch.int8
            assert part.zero_point is None
            assert not integers[:, :, expected.shape[2] :].any()
        assert integers.shape[2] % 64 == 0
        integers = integers[:, :, : expected.shape[2]]
        assert torch.equal(part.sums.int(), integers.sum(2).T)
        factor = part.scale / layer.weight_scale
        found += integers * factor.round().int()[:, None, None]
    assert torch.equal(found, expected)


def test_four_bits_stay_four():
    layer = layer_of(nn.Conv2d(64, 32, 3), 4)
    assert prepared(layer)[0].codes.nbytes == layer.weight.nbytes == 64 * 32 * 9 // 2
