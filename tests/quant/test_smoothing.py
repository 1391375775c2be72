import math

import pytest
import torch
from torch.nn import functional as F

from qncd_cli.quant.smoothing import MAX_RATIO, clamp_factor, embedding_factor, fold


def test_folding_changes_nothing_in_real_arithmetic():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 8, 6, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 8, 3, 3, generator=generator, dtype=torch.float64)
    factor = torch.rand(8, generator=generator, dtype=torch.float64) * 4 + 0.1
    plain = F.conv2d(h, weight, padding=1)
    smoothed = F.conv2d(h / factor.reshape(1, -1, 1, 1), fold(weight, factor), padding=1)
    assert torch.allclose(plain, smoothed, rtol=1e-12, atol=1e-12)
    linear = fold(torch.ones(3, 8, dtype=torch.float64), factor)
    assert torch.equal(linear, factor.expand(3, 8))


def test_factor_follows_the_definition():
    """S = |gamma| * mean over steps of max(GroupNorm(emb_t), 1), written out by hand."""
    generator = torch.Generator().manual_seed(1)
    steps, channels, groups = 3, 8, 2
    embedding = torch.randn(steps, channels, generator=generator) * 2
    gamma = torch.rand(channels, generator=generator) + 0.5
    expected = torch.zeros(channels)
    for row in embedding:
        for g in range(groups):
            part = row[g * 4 : g * 4 + 4]
            normed = (part - part.mean()) / torch.sqrt(part.var(unbiased=False) + 1e-5)
            expected[g * 4 : g * 4 + 4] += normed.clamp(min=1) / steps
    factor, clamped = embedding_factor(embedding, -gamma, groups)
    assert torch.allclose(factor, gamma * expected, rtol=1e-5)
    assert clamped == 0


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("gamma", [0.0, -1.0, 1e-20])
def test_factors_are_positive_and_finite_for_any_embedding(scale, gamma):
    embedding = torch.randn(4, 16, generator=torch.Generator().manual_seed(2)) * scale
    weights = torch.ones(16)
    weights[3] = gamma
    factor, clamped = embedding_factor(embedding, weights, 4)
    assert torch.isfinite(factor).all()
    assert (factor > 0).all()
    assert factor.max() / factor.min() <= MAX_RATIO**2 * 1.001


def test_clamping_is_counted():
    factor, clamped = clamp_factor(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1e-9]))
    assert clamped == 1
    assert factor.min() > 1e-9
