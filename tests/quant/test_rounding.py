import pytest
import torch
from torch import nn

from qncd_cli.quant.affine import dequantize, fake_quantize
from qncd_cli.quant.gptq import HessianAccumulator, gptq_codes, input_vectors
from qncd_cli.quant.rounding import (
    hessian_error,
    minmax_weight_qparams,
    mse_weight_qparams,
    round_gptq,
    round_nearest,
)
from qncd_cli.spec import weight_spec


def correlated_inputs(rows, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator)
    return torch.randn(rows, size, generator=generator) @ mix


def hessian_of(x):
    return 2 * x.T @ x / len(x)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [5, 130, 300])
def test_gptq_is_never_worse_than_nearest_on_its_objective_and_stays_in_range(bits, size):
    x = correlated_inputs(400, size, seed=bits)
    weight = torch.randn(12, size, generator=torch.Generator().manual_seed(1))
    weight[0] = 0
    spec, hessian = weight_spec(bits), hessian_of(x)
    nearest = round_nearest(weight, spec)
    gptq = round_gptq(weight, spec, hessian)
    assert gptq.codes.min() >= spec.qmin
    assert gptq.codes.max() <= spec.qmax
    before = hessian_error(weight, nearest.codes, nearest.qparams, hessian)
    after = hessian_error(weight, gptq.codes, gptq.qparams, hessian)
    assert (after <= before).all()
    if bits <= 4 and size > 100:
        assert after.sum() < 0.7 * before.sum()


def test_hessian_error_is_the_squared_output_error():
    x = correlated_inputs(50, 9).double()
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    spec = weight_spec(4)
    rounded = round_nearest(weight, spec)
    difference = weight - dequantize(rounded.codes, rounded.qparams, spec)
    expected = 2 * (x.float() @ difference.T).square().mean(0)
    found = hessian_error(weight, rounded.codes, rounded.qparams, hessian_of(x.float()))
    assert torch.allclose(found, expected, rtol=1e-4)


def test_with_an_identity_hessian_gptq_is_nearest():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    spec = weight_spec(4)
    nearest = round_nearest(weight, spec)
    codes, _ = gptq_codes(weight, torch.eye(40), nearest.qparams, spec)
    assert torch.equal(codes, nearest.codes)


def test_a_hessian_that_cannot_be_factored_falls_back_and_says_so():
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    hessian = -torch.ones(8, 8) * 1e6 + torch.eye(8) * 1.1e6
    rounded = round_gptq(weight, weight_spec(4), hessian)
    assert "nearest" in rounded.note
    assert torch.equal(rounded.codes, round_nearest(weight, weight_spec(4)).codes)


def test_inputs_that_are_always_zero_do_no_harm():
    x = correlated_inputs(100, 10)
    x[:, 4] = 0
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    codes = round_gptq(weight, weight_spec(4), hessian_of(x)).codes
    assert torch.isfinite(codes.float()).all()


def test_mse_clipping_never_loses_to_minmax():
    weight = torch.randn(10, 200, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 8.0
    spec = weight_spec(4)
    errors = [
        (fake_quantize(weight, choose(weight, spec), spec) - weight).square().sum(1)
        for choose in (mse_weight_qparams, minmax_weight_qparams)
    ]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.9 * errors[1].sum()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Conv2d(3, 4, 1),
        nn.Linear(5, 4),
    ],
)
def test_input_vectors_times_weight_is_the_layer(layer):
    shape = (2, 3, 6, 6) if isinstance(layer, nn.Conv2d) else (2, 7, 5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = input_vectors(x, layer)
    out = rows @ layer.weight.reshape(4, -1).T + layer.bias
    expected = layer(x)
    expected = expected.permute(0, 2, 3, 1) if isinstance(layer, nn.Conv2d) else expected
    assert torch.allclose(out, expected.reshape(-1, 4), atol=1e-5)


def test_hessian_accumulates_over_updates_and_merges():
    layer = nn.Linear(6, 2)
    x = correlated_inputs(60, 6)
    whole, first, second = (HessianAccumulator(6) for _ in range(3))
    whole.update(x, layer)
    first.update(x[:25], layer)
    second.update(x[25:], layer)
    first.merge(second)
    assert torch.allclose(first.hessian(), whole.hessian(), rtol=1e-5)
    assert torch.allclose(whole.hessian(), hessian_of(x), rtol=1e-5)
