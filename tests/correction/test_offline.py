"""Statistics of planted noise, and the corrections that apply them, on analytic denoisers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from analytic import BIAS, STEPS, distance, gaussian, sample

from qncd_cli.correction.offline import AffineCorrection, PtqdCorrection
from qncd_cli.correction.statistics import NoiseStatistics
from qncd_cli.errors import ConfigError
from qncd_cli.sampling.noise import generator_for

K, SIGMA_R = -0.06, 0.1


def planted(eps, generator):
    """eps~ = (1 + K) eps + r, r ~ N(BIAS, SIGMA_R^2)."""
    return (1 + K) * eps + BIAS + SIGMA_R * torch.randn(eps.shape, generator=generator)


def collect(seeds, quantize, times=None):
    """Statistics along the full-precision trajectories of `seeds`, as a stage collects them."""
    statistics = NoiseStatistics()
    noise = generator_for(0, "quantization")

    def on_step(i, t, x, prediction):
        if times is None or i in times:
            statistics.update(t, prediction, quantize(prediction, noise))

    sample(gaussian(1.0), seeds=seeds, on_step=on_step)
    return statistics


@pytest.fixture(scope="module")
def statistics():
    return collect(range(16), planted).finish()


def test_statistics_recover_planted_noise(statistics):
    assert statistics["timesteps"].dtype == torch.int64
    assert len(statistics["timesteps"]) == STEPS
    assert all(v.dtype == torch.float32 for n, v in statistics.items() if n != "timesteps")
    bias = BIAS.view(1, 3).expand(STEPS, 3)
    assert torch.allclose(statistics["correlation_k"], torch.tensor(K), atol=0.01)
    assert torch.allclose(statistics["residual_mean"], bias, atol=0.01)
    assert torch.allclose(statistics["residual_variance"], torch.tensor(SIGMA_R**2), rtol=0.05)
    assert statistics["mean"].shape == statistics["variance"].shape == (STEPS, 3)


def test_mean_and_variance_match_torch():
    f, g = torch.randn(2, 5, 3, 4, 4, generator=generator_for(6))
    statistics = NoiseStatistics()
    statistics.update(7, f, g)
    result, q = statistics.finish(), (g - f).transpose(0, 1).flatten(1)
    assert torch.allclose(result["mean"][0], q.mean(1), atol=1e-6)
    assert torch.allclose(result["variance"][0], q.var(1, correction=0), rtol=1e-5)


def test_affine_is_the_least_squares_fit():
    f, g = torch.randn(2, 5, 3, 4, 4, generator=generator_for(6))
    g = 0.8 * f + 0.3 * g + 0.1
    statistics = NoiseStatistics()
    statistics.update(7, f, g)
    result = statistics.finish(ridge=0.0)
    for c in range(3):
        design = torch.stack([g[:, c].flatten(), torch.ones(80)], 1)
        fit = torch.linalg.lstsq(design, f[:, c].flatten()).solution
        assert result["affine_a"][0, c].item() == pytest.approx(fit[0].item(), abs=1e-5)
        assert result["affine_b"][0, c].item() == pytest.approx(fit[1].item(), abs=1e-5)
    strong = statistics.finish(ridge=1e6)
    assert torch.allclose(strong["affine_a"], torch.ones(1, 3), atol=1e-3)
    assert torch.allclose(strong["affine_b"], torch.zeros(1, 3), atol=1e-3)


def test_affine_recovers_planted_a_and_b():
    """eps = a eps~ + b exactly: a = 1 / (1 + K), b = -BIAS / (1 + K)."""
    result = collect(range(4), lambda eps, _: (1 + K) * eps + BIAS).finish()
    expected = (-BIAS / (1 + K)).view(1, 3).expand(STEPS, 3)
    assert torch.allclose(result["affine_a"], torch.tensor(1 / (1 + K)), atol=5e-3)
    assert torch.allclose(result["affine_b"], expected, atol=5e-3)


def test_merge_equals_one_pass():
    parts = [collect(range(4), planted, times=t) for t in ({0, 1}, {1, 5})]
    whole, merged = NoiseStatistics(), NoiseStatistics()
    for part in parts:
        merged.merge(part)
        for t, sums in part.sums.items():
            whole.sums[t] = whole.sums.get(t, 0) + sums
    assert len(merged.sums) == 3
    for name, value in merged.finish().items():
        assert torch.equal(value, whole.finish()[name])
    before = parts[0].sums[max(parts[0].sums)].clone()
    merged.merge(parts[0])
    assert torch.equal(parts[0].sums[max(parts[0].sums)], before)  # merge copies


def test_statistics_of_an_exact_model_change_no_bit():
    statistics = collect(range(2), lambda eps, _: eps).finish()
    plain = sample(gaussian(1.0))
    for correction in (PtqdCorrection(statistics), AffineCorrection(statistics)):
        assert torch.equal(sample(gaussian(1.0), correction), plain)
        assert torch.equal(
            sample(gaussian(1.0), correction, eta=1.0), sample(gaussian(1.0), eta=1.0)
        )


@pytest.mark.parametrize("kind", [PtqdCorrection, AffineCorrection])
def test_offline_corrections_restore_the_trajectory(kind):
    quantized, exact = gaussian(1.0, bias=BIAS, k=K), sample(gaussian(1.0))
    statistics = collect(range(8), lambda eps, _: (1 + K) * eps + BIAS).finish()
    correction = kind(statistics)
    assert distance(sample(quantized, correction), exact) < 0.02 * distance(
        sample(quantized), exact
    )
    assert correction.extra_calls == 0


def test_ptqd_variance_restores_the_spread_of_stochastic_samples(statistics):
    """Residual noise adds to sigma^2 what the deduction takes off: x keeps its variance."""
    noisy = generator_for(1, "quantization")

    def quantized(x, t):
        return planted(gaussian(1.0)(x, t), noisy)

    ptqd = PtqdCorrection(statistics)
    step = SimpleNamespace(t=float(statistics["timesteps"][0]))
    assert ptqd.deductible_variance(step).item() == pytest.approx((SIGMA_R / (1 + K)) ** 2, 0.05)
    exact = sample(gaussian(1.0), eta=1.0).var().item()
    without = sample(quantized, PtqdCorrection(statistics, deduct_variance=False), eta=1.0)
    assert abs(sample(quantized, ptqd, eta=1.0).var().item() - exact) < abs(
        without.var().item() - exact
    )


@pytest.mark.parametrize("kind", [PtqdCorrection, AffineCorrection])
def test_unknown_timestep_says_what_to_do(kind):
    statistics = collect(range(1), planted, times={0}).finish()
    with pytest.raises(ConfigError, match=r"other steps.*run quantize again.*--inter none"):
        sample(gaussian(1.0), kind(statistics))


def test_statistics_refuse_nonsense():
    with pytest.raises(ValueError, match="shapes differ"):
        NoiseStatistics().update(1, torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="never called"):
        NoiseStatistics().finish()
