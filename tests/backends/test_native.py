"""The statistics of group normalization, from C++ and from torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qncd_cli.backends import graph, native, traced

needs_compiler = pytest.mark.skipif(
    bool(graph.why_unavailable()), reason="no C++ compiler to make the kernels"
)
SHAPES = [(2, 64, 8, 8), (3, 12, 5, 7), (2, 96, 1, 1), (2, 24, 33), (1, 6, 40, 3)]
GROUPS = {64: 32, 12: 4, 96: 32, 24: 1, 6: 6}


def made(shape, dtype=torch.float32, offset=0.5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 2 + offset
    weight, bias = torch.randn(2, shape[1], generator=generator).unbind()
    return x.to(dtype), weight, bias


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def normalized(x, weight, bias, groups, eps=1e-5):
    shift, factor = native.group_norm_statistics(x, weight, groups, eps)
    assert factor.shape == shift.shape == x.shape[:2]
    assert factor.dtype == shift.dtype == torch.float32
    ones = [1] * (x.ndim - 2)
    shift, factor = (found.double().view(*found.shape, *ones) for found in (shift, factor))
    return (x.double() - shift) * factor + bias.double().view(-1, *ones)


@pytest.fixture(params=["kernels", "torch"])
def either(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C++ compiler to make the kernels")


@needs_compiler
def test_the_kernels_can_be_made_where_graphs_can():
    assert native.library() is not None


@pytest.mark.parametrize("order", [channels_last, torch.Tensor.contiguous])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_group_normalization(either, shape, dtype, order):
    x, weight, bias = made(shape, dtype)
    groups = GROUPS[shape[1]]
    expected = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    found = normalized(order(x), weight, bias, groups)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_a_mean_far_from_zero_costs_no_digits(either):
    """Deviations of a thousandth of the mean."""
    x, weight, _ = made((2, 64, 16, 16))
    x = channels_last(x / 2 + 1000)
    _, factor = native.group_norm_statistics(x, weight, 32, 1e-5)
    variance = x.double().unflatten(1, (32, 2)).flatten(2).var(2, correction=0)
    exact = (variance + 1e-5).rsqrt().repeat_interleave(2, 1) * weight
    torch.testing.assert_close(factor.double(), exact.double(), rtol=1e-5, atol=0)


def test_a_constant_input_is_its_bias(either):
    _, weight, bias = made((2, 64, 8, 8))
    found = normalized(torch.full((2, 64, 8, 8), 3.25), weight, bias, 32)
    torch.testing.assert_close(found, bias.double().view(1, -1, 1, 1).expand_as(found))


def test_a_sample_depends_neither_on_its_batch_nor_on_the_number_of_threads(either):
    x, weight, _ = made((5, 64, 24, 24))
    x, threads = channels_last(x), torch.get_num_threads()
    together = native.group_norm_statistics(x, weight, 32, 1e-5)
    alone = native.group_norm_statistics(x[2:3], weight, 32, 1e-5)
    try:
        torch.set_num_threads(threads + 1)
        again = native.group_norm_statistics(x, weight, 32, 1e-5)
    finally:
        torch.set_num_threads(threads)
    for whole, single, other in zip(together, alone, again, strict=True):
        assert torch.equal(whole[2:3], single)
        assert torch.equal(whole, other)


def test_norms_are_open_only_while_they_are_traced():
    x, weight, bias = made((2, 12, 5, 7))
    norm = nn.GroupNorm(4, 12)
    plain = nn.GroupNorm(4, 12, affine=False)
    norm.weight.data, norm.bias.data = weight, bias
    expected = norm(x)
    with torch.no_grad(), traced.open_norms(nn.Sequential(norm, plain)):
        torch.testing.assert_close(norm(x), expected)
        assert norm(x.bfloat16()).dtype == torch.bfloat16
        assert "forward" in vars(norm)
        assert "forward" not in vars(plain)
    assert "forward" not in vars(norm)
    assert torch.equal(norm(x), expected)
