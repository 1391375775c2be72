"""Group norms of compiled graphs against those of torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qncd_cli.backends.compiled.group_norm import group_norm


@pytest.mark.parametrize("distance", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("shape", [(2, 48, 16, 16), (3, 24, 7), (1, 8, 1, 1)])
def test_group_norms_by_channel_are_group_norms(shape, distance):
    """Also where the mean of a channel lies far from zero; the deviation in units of the output."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, shape[1])
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(shape) + distance * torch.randn(1, shape[1], *[1] * (len(shape) - 2))
    with torch.no_grad():
        exact = norm.double()(x.double())
        norm = norm.float()
        found = group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    assert found.shape == exact.shape
    assert float((found - exact).abs().max()) < 1e-5
