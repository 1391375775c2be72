import pytest
import torch

from qncd_cli.quant.affine import choose_qparams, dequantize, fake_quantize, quantize
from qncd_cli.spec import QSpec, activation_spec, weight_spec


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("seed", range(5))
def test_error_is_at_most_half_a_scale_inside_the_range(bits, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1000, generator=generator) * 10**seed
    spec = activation_spec(bits)
    qparams = choose_qparams(x.min(), x.max(), spec)
    error = (fake_quantize(x, qparams, spec) - x).abs().max()
    # the zero_point is rounded, which shifts the range by up to half a scale at its ends
    assert error <= qparams.scale * (1 + 1e-4)
    inner = x[(x > x.min() + qparams.scale) & (x < x.max() - qparams.scale)]
    assert (fake_quantize(inner, qparams, spec) - inner).abs().max() <= qparams.scale * 0.5001


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 5.0), (2.0, 5.0), (-5.0, -2.0), (0.0, 0.0), (3.0, 3.0)]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_is_exact_and_one_sided_ranges_keep_their_end(low, high, bits):
    spec = activation_spec(bits)
    qparams = choose_qparams(torch.tensor(low), torch.tensor(high), spec)
    zero = fake_quantize(torch.zeros(1), qparams, spec)
    assert zero.item() == 0.0
    for end in (low, high):
        back = fake_quantize(torch.tensor([end]), qparams, spec).item()
        assert abs(back - end) <= 0.5001 * qparams.scale.item()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_weight_codes_less_zero_point_fit_int8(bits):
    spec = weight_spec(bits)
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(bits)) + 0.5
    weight[0] = 0.0
    weight[1] = 3.0
    qparams = choose_qparams(weight.amin(1), weight.amax(1), spec)
    codes = quantize(weight, qparams, spec)
    assert codes.min() >= spec.qmin
    assert codes.max() <= spec.qmax
    centred = codes - qparams.zero_point[:, None]
    assert centred.abs().max() <= 127
    assert torch.equal(dequantize(codes, qparams, spec), fake_quantize(weight, qparams, spec))


def test_symmetric_has_zero_point_zero_and_eight_bit_weights_are_symmetric():
    spec = weight_spec(8)
    assert spec.symmetric
    assert (spec.qmin, spec.qmax) == (-127, 127)
    qparams = choose_qparams(torch.tensor([-1.0]), torch.tensor([3.0]), spec)
    assert qparams.zero_point.tolist() == [0]


def test_against_core_pytorch():
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    spec = QSpec(8)
    qparams = choose_qparams(x.min(), x.max(), spec)
    scale, zero_point = qparams.scale.item(), qparams.zero_point.item()
    oracle = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)
    # PyTorch multiplies by 1/scale: a value on a rounding boundary may fall on the other side
    difference = (fake_quantize(x, qparams, spec) - oracle).abs()
    assert (difference > 1e-6).float().mean() < 0.01
    assert difference.max() <= scale * 1.0001


def test_arguments_are_left_alone():
    x, low, high = torch.randn(10), torch.tensor(-1.0), torch.tensor(1.0)
    before = x.clone()
    fake_quantize(x, choose_qparams(low, high, QSpec(8)), QSpec(8))
    assert torch.equal(x, before)
    assert (low.item(), high.item()) == (-1.0, 1.0)


@pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_impossible_ranges_are_refused(low, high):
    with pytest.raises(ValueError, match="range is not finite|exceeds"):
        choose_qparams(torch.tensor(low), torch.tensor(high), QSpec(8))


@pytest.mark.parametrize("exponent", [-20, -30, -60, -100])
@pytest.mark.parametrize("spec", [weight_spec(4), weight_spec(8), activation_spec(8)], ids=str)
def test_small_values_are_quantized_as_well_as_large_ones(spec, exponent):
    """A power of two passes through unchanged: the same codes, the scale times it."""
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    axis = (1,) if spec.axis == 0 else (0, 1)
    one = choose_qparams(x.amin(axis), x.amax(axis), spec)
    small = x * 2.0**exponent
    other = choose_qparams(small.amin(axis), small.amax(axis), spec)
    assert torch.equal(other.scale, one.scale * 2.0**exponent)
    assert torch.equal(quantize(small, other, spec), quantize(x, one, spec))


def test_the_smallest_ranges_have_a_scale_that_can_be_divided_by():
    spec = activation_spec(8)
    for high in (0.0, 1e-45, 1e-38):
        qparams = choose_qparams(torch.tensor(0.0), torch.tensor(high), spec)
        assert qparams.scale > 0 and torch.isfinite(1 / qparams.scale)
        assert fake_quantize(torch.tensor(high), qparams, spec).isfinite()
