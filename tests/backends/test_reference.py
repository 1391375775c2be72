"""The simulation's sums are exact whatever surrounds it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qncd_cli.backends.reference import simulate

from .test_int8 import layer_of, random


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize(
    ("original", "shape"),
    [(nn.Conv2d(64, 24, 3, padding=1), (2, 64, 5, 5)), (nn.Linear(320, 24), (9, 320))],
    ids=["conv", "linear"],
)
def test_autocast_does_not_round_integer_sums(original, shape, bits, dtype):
    """In 16 bits an integer above 2048 (256 in bfloat16) is another one."""
    layer, x = layer_of(original, 8, bits), random(*shape)
    expected = simulate(layer, x)
    with torch.autocast("cpu", dtype):
        assert original(x).dtype == dtype  # as the layer would have been computed
        output = simulate(layer, x)
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)


def test_shapes_can_be_simulated_without_numbers():
    """--plan runs layers on the meta device, which knows no autocast."""
    layer = layer_of(nn.Linear(6, 5), 8, 32).to("meta")
    assert simulate(layer, torch.empty(3, 6, device="meta")).shape == (3, 5)
