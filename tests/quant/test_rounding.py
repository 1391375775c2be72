import pytest
import torch
from torch import nn

from qncd_cli.quant import rounding
from qncd_cli.quant.affine import choose_qparams, dequantize, fake_quantize
from qncd_cli.quant.gptq import HessianAccumulator, conditional_variances, gptq_codes, input_vectors
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
    gptq, _ = round_gptq(weight, spec, hessian)
    assert gptq.codes.min() >= spec.qmin
    assert gptq.codes.max() <= spec.qmax
    before = hessian_error(weight, nearest.codes, nearest.qparams, hessian)
    after = hessian_error(weight, gptq.codes, gptq.qparams, hessian)
    assert (after <= before).all()
    if bits <= 4 and size > 100:
        assert after.sum() < 0.7 * before.sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_no_weight_and_no_hessian_leads_out_of_the_integer_range(bits, scale):
    """Outliers, constants, dead inputs and inputs that are copies of each other."""
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(bits)) * scale
    weight[0], weight[1] = 0, scale
    weight[2, 5], weight[3, 0] = 50 * scale, -50 * scale
    x = correlated_inputs(60, 24, seed=bits)
    x[:, 3], x[:, 7] = 0, x[:, 8]
    spec = weight_spec(bits)
    for rounded in (round_nearest(weight, spec), round_gptq(weight, spec, hessian_of(x))[0]):
        assert rounded.codes.dtype == torch.int32
        assert rounded.codes.min() >= spec.qmin
        assert rounded.codes.max() <= spec.qmax
        assert torch.isfinite(rounded.qparams.scale).all()
        assert (rounded.qparams.scale > 0).all()
        centred = rounded.codes - rounded.qparams.zero_point[:, None]
        assert centred.abs().max() <= 127


# ---- what GPTQ will leave -----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("size", "seed"), [(20, 0), (60, 1), (150, 2)])
def test_conditional_variances_predict_the_error_of_gptq(bits, size, seed):
    """D_o^2 / 12 times their sum; ranges with room for what is pushed onto later columns."""
    hessian = hessian_of(correlated_inputs(4 * size, size, seed))
    weight = torch.randn(64, size, generator=torch.Generator().manual_seed(seed))
    spec = weight_spec(bits)
    qparams = choose_qparams(3 * weight.amin(1), 3 * weight.amax(1), spec)
    codes, note = gptq_codes(weight, hessian, qparams, spec)
    assert note == ""
    found = float(hessian_error(weight, codes, qparams, hessian).sum())
    variances = conditional_variances(hessian)
    predicted = float(variances.sum() * qparams.scale.double().square().sum() / 12)
    assert predicted == pytest.approx(found, rel=0.25)
    # nearest rounding, which has the whole variance of every input to answer for
    assert variances.sum() < 0.8 * hessian.diagonal().sum()


def test_inputs_divided_by_a_factor_have_variances_divided_by_its_square():
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(40) + 0.5 * torch.randn(40, 40, generator=generator) / 40**0.5
    x = torch.randn(800, 40, generator=generator) @ mix * torch.linspace(2, 1, 40)
    x = x[:, torch.argsort(x.square().mean(0), descending=True)]
    before = conditional_variances(hessian_of(x))
    assert torch.allclose(conditional_variances(hessian_of(x / 3)), before / 9, rtol=1e-4)
    factor = torch.linspace(1, 1.6, 40)  # keeps the order of the diagonal
    after = conditional_variances(hessian_of(x / factor))
    assert torch.allclose(after, before / factor.double().square(), rtol=0.05)


def test_variances_of_independent_and_of_copied_inputs():
    diagonal = torch.tensor([1.0, 4.0, 9.0])
    independent = conditional_variances(torch.diag(diagonal))
    assert torch.allclose(independent, diagonal.double(), rtol=0.05)
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    copied = conditional_variances(hessian_of(x[:, [0, 1, 1]]))
    assert copied[1] + copied[2] < 1.1 * hessian_of(x)[1, 1]
    assert torch.isfinite(conditional_variances(torch.zeros(3, 3))).all()


# ---- the objective and its inputs ---------------------------------------------------------------


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
    rounded, _ = round_gptq(weight, weight_spec(4), hessian)
    assert "nearest" in rounded.note
    assert torch.equal(rounded.codes, round_nearest(weight, weight_spec(4)).codes)


def test_inputs_that_are_always_zero_do_no_harm():
    x = correlated_inputs(100, 10)
    x[:, 4] = 0
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    codes = round_gptq(weight, weight_spec(4), hessian_of(x))[0].codes
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


def test_a_channels_range_depends_on_no_other_channel(monkeypatch):
    """Rows are searched in parts that fit a cache; where they are cut changes no bit."""
    weight = torch.randn(37, 50, generator=torch.Generator().manual_seed(0)) ** 3
    spec = weight_spec(4)
    whole = mse_weight_qparams(weight, spec)
    for at_once in (1, 120, 1000):
        monkeypatch.setattr(rounding, "SEARCHED_AT_ONCE", at_once)
        parts = mse_weight_qparams(weight, spec)
        assert torch.equal(parts.scale, whole.scale)
        assert torch.equal(parts.zero_point, whole.zero_point)


@pytest.mark.parametrize(("weights", "inputs"), [(-30, 0), (0, -30), (-40, -20), (30, 20)])
@pytest.mark.parametrize("bits", [4, 8])
def test_tiny_and_huge_weights_are_rounded_to_the_same_codes(bits, weights, inputs):
    """Scaled by powers of two, as before a large gain; a floor of a scale turned them to zeros."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(6, 24, generator=generator)
    x = torch.randn(200, 24, generator=generator)
    spec, hessian = weight_spec(bits), 2 * x.T @ x / len(x)
    small, small_hessian = weight * 2.0**weights, hessian * 2.0 ** (2 * inputs)
    for one, other in (
        (round_nearest(weight, spec), round_nearest(small, spec)),
        (round_gptq(weight, spec, hessian)[0], round_gptq(small, spec, small_hessian)[0]),
    ):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.qparams.scale * 2.0**weights, other.qparams.scale)
        assert one.note == other.note == ""
    variances = conditional_variances(small_hessian)
    assert torch.equal(variances, conditional_variances(hessian) * 2.0 ** (2 * inputs))
