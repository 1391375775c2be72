import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qncd_cli.quant.affine import choose_qparams, fake_quantize
from qncd_cli.quant.rounding import round_nearest
from qncd_cli.quant.smoothing import (
    IDENTITY,
    MAX_RATIO,
    clamp_factor,
    embedding_factor,
    fold,
    modulation_factor,
    range_factor,
    shifted_bias,
    smooth,
    smoothquant_factor,
    split_factor,
)
from qncd_cli.spec import activation_spec, weight_spec


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
    factor, clamped, shift = embedding_factor(embedding, -gamma, groups)[:3]
    assert shift is None
    assert torch.allclose(factor, gamma * expected, rtol=1e-5)
    assert clamped == 0


HUGE = 3e38  # close to the largest float32


def embeddings() -> dict[str, Tensor]:
    """[4, 16]: ordinary, constant, tiny, huge; a channel, or all, not finite."""
    ordinary = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    found = {f"x{scale:g}": ordinary * scale for scale in (0.0, 1e-30, 1.0, 1e30)}
    found |= {"huge": ordinary.sign() * HUGE, "constant": torch.full((4, 16), -3.0)}
    for value in (math.inf, -math.inf, math.nan):
        found |= {f"one {value}": ordinary.clone(), f"all {value}": torch.full((4, 16), value)}
        found[f"one {value}"][:, 5] = value
    found["both infinities"] = ordinary.sign() * math.inf
    return found


def check(factor: Tensor) -> None:
    assert factor.dtype == torch.float32
    assert torch.isfinite(factor).all()
    assert (factor > 0).all()
    assert factor.max() / factor.min() <= MAX_RATIO**2 * 1.001


@pytest.mark.parametrize("name", embeddings())
@pytest.mark.parametrize("gamma", [0.0, -1.0, 1e-20])
def test_embedding_factors_are_positive_and_finite(name, gamma):
    weights = torch.ones(16)
    weights[3] = gamma
    check(embedding_factor(embeddings()[name], weights, 4).factor)
    check(embedding_factor(embeddings()[name], None, 4).factor)
    check(modulation_factor(embeddings()[name]).factor)


@pytest.mark.parametrize("name", embeddings())
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_factors_of_ranges_are_positive_and_finite(name, strength):
    x = embeddings()[name]
    low, high = x.amin(0), x.amax(0)
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    weight[:, 2] = 0
    absmax = torch.maximum(-low, high)
    check(smoothquant_factor(absmax, weight, strength).factor)
    check(split_factor(low, high, 5).factor)
    for shifted in (False, True):
        factor, _, shift = range_factor(low, high, strength, shifted=shifted)[:3]
        check(factor)
        assert (shift is not None) == shifted
        assert shift is None or torch.isfinite(shift).all()


def test_at_full_strength_shifted_channels_fill_one_range():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(200, 8, generator=generator) * torch.linspace(0.5, 2, 8) + torch.arange(8)
    factor, clamped, shift = range_factor(x.amin(0), x.amax(0), 1.0, shifted=True)[:3]
    y = smooth(x, factor, -1, shift)
    assert clamped == 0
    assert torch.allclose(y.amax(0), torch.ones(8), atol=1e-5)
    assert torch.allclose(y.amin(0), -torch.ones(8), atol=1e-5)


POINTWISE = [
    (nn.Conv2d(8, 5, 1), (2, 8, 6, 6)),
    (nn.Conv2d(8, 5, 1, stride=2, bias=False), (2, 8, 6, 6)),
    (nn.Linear(8, 5), (2, 7, 8)),
    (nn.Linear(8, 5, bias=False), (3, 8)),
]


@pytest.mark.parametrize(("layer", "shape"), POINTWISE, ids=[str(p[0]) for p in POINTWISE])
def test_a_folded_shift_is_invisible_in_float(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 1
    axis = 1 if isinstance(layer, nn.Conv2d) else -1
    flat = x.movedim(axis, 0).flatten(1)
    factor, _, shift = range_factor(flat.amin(1), flat.amax(1), 0.75, shifted=True)[:3]
    assert shift.abs().max() > 0.1
    with torch.no_grad():
        expected = layer(x)
        layer = copy.deepcopy(layer)
        layer.bias = nn.Parameter(shifted_bias(layer.weight, layer.bias, shift))
        layer.weight.data = fold(layer.weight, factor)
        found = layer(smooth(x, factor, axis, shift))
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def outputs(x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """Both operands quantized, W4A8."""
    spec, inputs = weight_spec(4), activation_spec(8)
    folded, y = fold(weight, factor), smooth(x, factor, -1)
    y = fake_quantize(y, choose_qparams(y.min(), y.max(), inputs), inputs)
    return F.linear(y, fake_quantize(folded, round_nearest(folded, spec).qparams, spec))


def test_split_quantization_of_equal_ranges_is_unsplit_quantization_to_the_bit():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(50, 12, generator=generator)
    weight = torch.randn(6, 12, generator=generator)
    x[3, 2] = x[7, 9] = 5.3  # the widest value of either part
    factor, clamped, shift = split_factor(x.amin(0), x.amax(0), 7)[:3]
    assert torch.equal(factor, torch.ones(12))
    assert (clamped, shift) == (0, None)
    assert torch.equal(outputs(x, weight, factor), outputs(x, weight, torch.ones(12)))


def test_split_quantization_gives_each_part_its_own_range():
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(50, 12, generator=generator)
    x[:, 7:] *= 9
    weight = torch.randn(6, 12, generator=generator)
    weight[:, 7:] /= 9  # both parts matter alike
    factor = split_factor(x.amin(0), x.amax(0), 7).factor
    y = smooth(x, factor, -1)
    assert torch.allclose(y[:, :7].abs().max(), y[:, 7:].abs().max())
    assert len(factor.unique()) == 2
    exact = F.linear(x, weight)
    split, unsplit = (outputs(x, weight, f) - exact for f in (factor, torch.ones(12)))
    assert split.norm() < 0.5 * unsplit.norm()


def test_clamping_is_counted():
    factor, clamped, _ = clamp_factor(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1e-9]))[:3]
    assert clamped == 1
    assert factor.min() > 1e-9


@pytest.mark.parametrize("exponent", [-60, -30, 30])
def test_factors_do_not_depend_on_the_unit_of_inputs_or_weights(exponent):
    """But for a common factor, which one scale per tensor takes back."""
    generator = torch.Generator().manual_seed(2)
    low, high = -torch.rand(16, generator=generator), torch.rand(16, generator=generator)
    low[3] = high[3] = 0.0  # a channel that was never on
    weight = torch.randn(8, 16, generator=generator)
    unit = 2.0**exponent
    pairs = [
        (smoothquant_factor(high, weight, 0.5), smoothquant_factor(high * unit, weight, 0.5)),
        (smoothquant_factor(high, weight, 0.5), smoothquant_factor(high, weight * unit, 0.5)),
        (
            range_factor(low, high, 1.0, shifted=False),
            range_factor(low * unit, high * unit, 1.0, shifted=False),
        ),
        (
            range_factor(low, high, 1.0, shifted=True),
            range_factor(low * unit, high * unit, 1.0, shifted=True),
        ),
        (split_factor(low, high, 8), split_factor(low * unit, high * unit, 8)),
    ]
    for one, other in pairs:
        assert one.clamped == other.clamped
        ratio = other.factor / one.factor
        assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-5)


def test_the_identity_gives_back_what_it_is_given():
    x, weight = torch.randn(2, 8, 3, 3), torch.randn(5, 8, 3, 3)
    for made, given in (
        (IDENTITY.apply(x, 1), x),
        (IDENTITY.scaled_back(x, 1), x),
        (IDENTITY.fold(weight), weight),
        (IDENTITY.unfold(weight), weight),
        (IDENTITY.bias(weight, x), x),
    ):
        assert made is given
    assert IDENTITY.bias(weight, None) is None
    assert IDENTITY.tensors() == {}


@pytest.mark.parametrize("shifted", [False, True])
def test_what_a_factor_applies_and_folds_it_takes_back(shifted):
    factor = range_factor(torch.arange(8) - 9.0, torch.arange(8) + 2.0, 0.5, shifted=shifted)
    x, weight = torch.randn(7, 8), torch.randn(5, 8)
    assert torch.equal(factor.apply(x, -1), smooth(x, factor.factor, -1, factor.shift))
    assert torch.allclose(factor.scaled_back(x / factor.factor, -1), x)
    assert torch.allclose(factor.unfold(factor.fold(weight)), weight)
    assert factor.tensors().keys() == ({"smoothing", "shift"} if shifted else {"smoothing"})
    found = F.linear(factor.apply(x, -1), factor.fold(weight), factor.bias(weight, None))
    assert torch.allclose(found, F.linear(x, weight), atol=1e-4)
