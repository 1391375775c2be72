"""Run-time estimates and their correction, on analytic denoisers and planted noise."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from analytic import (
    BIAS,
    DDIM,
    LDM,
    SHAPE,
    STEPS,
    distance,
    full_precision_baseline,
    gaussian,
    runtime,
    sample,
)

from qncd_cli.correction.baseline import EstimatorBaseline, StepError, fit_gains
from qncd_cli.correction.runtime import (
    SLOPE_RATIOS,
    contained_noise,
    reduce_mean,
    renoise,
    slope,
    total_noise,
)
from qncd_cli.errors import ConfigError
from qncd_cli.sampling.noise import generator_for, generators_for
from qncd_cli.sampling.samplers import denoise, make_scheduler

# ---- pure functions ----------------------------------------------------------------------


def test_renoise_and_total_noise_agree():
    """x^_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) n, for any x0, eps_s and z."""
    x0, eps_s, z = torch.randn(3, 2, 3, 4, 4, generator=generator_for(1), dtype=torch.float64)
    abar_t, abar_s = 0.3, 0.45
    x_s = math.sqrt(abar_s) * x0 + math.sqrt(1 - abar_s) * eps_s
    assert torch.allclose(contained_noise(x_s, x0, abar_s), eps_s)
    n = total_noise(eps_s, z, abar_t, abar_s)
    x_t = renoise(x_s, abar_t, abar_s, z)
    assert torch.allclose(x_t, math.sqrt(abar_t) * x0 + math.sqrt(1 - abar_t) * n)
    assert torch.equal(renoise(x_s, abar_s, abar_s, z), x_s)


def test_total_noise_of_independent_parts_has_unit_variance():
    eps_s, z = torch.randn(2, 1, 200_000, generator=generator_for(2))
    assert total_noise(eps_s, z, 0.2, 0.7).var().item() == pytest.approx(1, abs=0.02)


def test_renoise_refuses_to_denoise():
    with pytest.raises(ValueError, match="noisier"):
        renoise(torch.zeros(1, 1), 0.5, 0.4, torch.zeros(1, 1))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 4, 5)])
def test_reduce_mean_is_per_sample(shape):
    q = torch.randn(shape, generator=generator_for(3))
    channel, tensor = reduce_mean(q, "channel"), reduce_mean(q, "tensor")
    assert channel.shape == (2, 3, *[1] * (len(shape) - 2))
    assert tensor.shape == (2, *[1] * (len(shape) - 1))
    assert torch.allclose(channel.flatten(1), q.reshape(2, 3, -1).mean(-1), atol=1e-6)
    assert torch.allclose(tensor.flatten(), q.flatten(1).mean(1), atol=1e-6)
    assert torch.equal(reduce_mean(q[1:], "channel"), channel[1:])
    with pytest.raises(ConfigError, match="granularity"):
        reduce_mean(q, "pixel")


def test_slope_recovers_a_factor_per_sample():
    n = torch.randn(2, 3, 4, 4, generator=generator_for(4))
    e = n * torch.tensor([0.9, 1.2]).view(2, 1, 1, 1)
    assert torch.allclose(slope(e, n), torch.tensor([0.9, 1.2]))


# ---- run-time correction -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "euler", "plms", "dpmsolver++", "unipc"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_point_mass_scores_zero_for_the_total_target(name):
    """s = 0: e^ equals n exactly, so there is no quantization noise to see; z alone misses."""
    scheduler = make_scheduler(name, {**LDM, "timestep_spacing": "leading"})
    total, injected = runtime(interval=1), runtime(interval=1, target="injected")
    plain = sample(gaussian(0.0), scheduler=scheduler)
    corrected = sample(gaussian(0.0), total, scheduler=scheduler)
    sample(gaussian(0.0), injected, scheduler=scheduler)
    assert max(e.mean.abs().max() for e in total.estimates) < 2e-3
    assert max(e.variance.max() for e in total.estimates) < 1e-4
    assert min(e.variance.min() for e in injected.estimates) > 0.01
    assert distance(corrected, plain) < 1e-3


def test_exact_model_is_disturbed_less_by_total_than_by_injected():
    exact = gaussian(1.0)
    plain = sample(exact)
    total, injected = (
        distance(sample(exact, runtime(target=target)), plain) for target in ("total", "injected")
    )
    assert 0 < 2 * total < injected


@pytest.mark.parametrize(("target", "left"), [("total", 0.5), ("injected", 0.7)])
def test_baseline_takes_the_models_own_error_off(target, left):
    """Approximately: the baseline is an average over other seeds, the chance mean of z remains."""
    full_precision = gaussian(1.0, bias=5 * BIAS)  # a systematic error that is nobody's fault
    options = {"interval": 1, "granularity": "channel", "target": target}
    baseline = full_precision_baseline(full_precision, target=target, granularity="channel")
    plain = sample(full_precision)
    without = sample(full_precision, runtime(**options))
    correction = runtime(**options, baseline=baseline)
    with_baseline = sample(full_precision, correction)
    assert 0 < distance(with_baseline, plain) < left * distance(without, plain)
    first = max(baseline.mean)
    assert baseline.mean[first].shape == (3,) and baseline.variance[first].shape == ()
    scalar = runtime(baseline=baseline)  # per-channel baseline, scalar correction
    assert sample(full_precision, scalar).shape == plain.shape
    elsewhere = EstimatorBaseline({1: baseline.mean[first]}, {}, {})
    with pytest.raises(ConfigError, match="other steps"):
        sample(full_precision, runtime(baseline=elsewhere))


@pytest.mark.parametrize("target", ["total", "injected"])
def test_one_estimate_sees_the_documented_share_of_a_shift(target):
    """The denoiser is linear, the draws are the same: the shares hold to float rounding."""
    s, runs = 0.8, []
    for bias in (0.0, 0.1):
        recorder, used = runtime(interval=1, apply=False, target=target), []
        sample(gaussian(s, bias), recorder, on_step=lambda i, t, x, e, u=used: u.append(e))
        runs.append((recorder.estimates, used))
    (exact, exact_used), (biased, biased_used) = runs
    for i, (without, with_bias) in enumerate(zip(exact, biased, strict=True)):
        t_next = exact[i + 1].t if i + 1 < len(exact) else LDM["steps_offset"]
        a_t, a_s = (DDIM.alphas_cumprod[t].item() for t in (without.t, t_next))
        w = (1 - a_t) / (a_t * s * s + 1 - a_t)
        rho = math.sqrt((1 - a_s) / a_s * a_t / (1 - a_t))
        share = (1 - w) * (1 - rho) if target == "total" else 1 - w * (1 - rho)
        shift = (biased_used[i] - exact_used[i]).mean().item()
        seen = (with_bias.mean - without.mean).mean().item()
        assert seen == pytest.approx(share * shift, abs=1e-5)


def test_constant_bias_is_recovered_and_filtered():
    """Total target where theory says it sees: few steps (rho small), wide data (w small).

    Most of the distance comes from step 0, which no estimate can precede.
    """
    bias, seeds, steps, s = 6 * BIAS, range(12), 5, 10.0
    left = []

    def draw(predict, correction=None):
        def on_step(i, t, x, prediction):
            left.append((prediction - gaussian(s)(x, t)).mean((0, 2, 3)))

        options = {"correction": correction, "on_step": on_step}
        return denoise(predict, DDIM, steps, generators_for(seeds), SHAPE, **options)

    correction = runtime(seeds, granularity="channel", interval=1)
    exact, biased = draw(gaussian(s)), draw(gaussian(s, bias))
    left.clear()
    corrected = draw(gaussian(s, bias), correction)
    found = correction.q_mean.mean(0, keepdim=True)
    assert torch.allclose(found / bias, torch.ones_like(bias), atol=0.2)
    assert left[-1].norm() < 0.2 * left[0].norm()
    assert distance(corrected, exact) < 0.95 * distance(biased, exact)


def test_scalar_granularity_keeps_one_number_per_sample():
    correction = runtime(interval=1)
    sample(gaussian(1.0, bias=0.05), correction)
    assert correction.q_mean.shape == (3, 1, 1, 1)
    assert len(set(correction.q_mean.flatten().tolist())) == 3


def test_estimate_acts_from_the_next_step_on_until_replaced():
    correction = runtime(interval=2)
    calls, used = [], []

    def predict(x, t):
        calls.append(float(t))
        return gaussian(1.0, bias=0.1)(x, t)

    def on_step(i, t, x, prediction):
        used.append((prediction - gaussian(1.0, bias=0.1)(x, t)).flatten(1).mean(1))

    sample(predict, correction, on_step=on_step)
    assert used[0].abs().max() == 0
    expected = [e.mean.mean(1) for e in correction.estimates]
    for i in range(1, STEPS):
        assert torch.allclose(-used[i], expected[(i - 1) // 2], atol=1e-5)
    assert len(calls) == STEPS + correction.extra_calls


@pytest.mark.parametrize(("interval", "calls"), [(1, 19), (5, 4), (10, 2), (19, 1), (100, 1)])
def test_interval_counts_extra_calls(interval, calls):
    correction = runtime(interval=interval)
    sample(gaussian(1.0), correction)
    assert correction.extra_calls == calls == len(correction.estimates)


def test_repeated_timestep_is_not_estimated():
    correction = runtime(interval=1)
    sample(gaussian(1.0), correction, scheduler=make_scheduler("plms", LDM))
    times = [e.t for e in correction.estimates]
    assert len(times) == len(set(times)) == STEPS - 1  # STEPS + 1 steps, one repeats, one is last


def test_z_and_result_do_not_depend_on_the_batch():
    inputs = {}

    def draw(seeds):
        seen = inputs.setdefault(tuple(seeds), [])

        def predict(x, t):
            seen.append(x)
            return gaussian(1.0, bias=BIAS)(x, t)

        return sample(predict, runtime(seeds, interval=3), seeds)

    batch, alone = draw([0, 1, 2, 3, 4]), draw([3])
    assert torch.equal(batch[3:4], alone)
    for together, single in zip(inputs[0, 1, 2, 3, 4], inputs[(3,)], strict=True):
        assert torch.equal(together[3:4], single)


def test_fresh_corrections_carry_nothing_over():
    def draw(seeds):
        return sample(gaussian(1.0, bias=BIAS), runtime(seeds, interval=3), seeds)

    first, second = draw([0, 1]), draw([2, 3])
    assert torch.equal(draw([2, 3]), second) and torch.equal(draw([0, 1]), first)


def test_reusing_a_correction_for_a_batch_of_another_size_is_an_error():
    with pytest.raises(ConfigError, match="2 generators for 3 samples"):
        sample(gaussian(1.0), runtime([0, 1]))


@pytest.mark.parametrize("option", [{"target": "z"}, {"granularity": "row"}, {"interval": 0}])
def test_runtime_options_are_checked(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        runtime(**option)


@pytest.mark.parametrize("k", [-0.1, 0.15])
@pytest.mark.parametrize("target", ["total", "injected"])
def test_slope_over_the_baseline_finds_a_planted_factor(target, k):
    slopes = full_precision_baseline(gaussian(1.0), target=target).slope
    correction = runtime(interval=1, target=target, apply=False)
    sample(gaussian(1.0, k=k), correction)
    ratios = torch.stack([e.slope / slopes[e.t] for e in correction.estimates])
    assert ratios.shape == (STEPS - 1, 3)
    assert ratios.mean().item() == pytest.approx(1 + k, abs=0.02)


@pytest.mark.parametrize(("target", "share"), [("total", 0.3), ("injected", 0.7)])
def test_slope_correction_removes_most_of_a_factor(target, share):
    seeds = range(6)
    exact = sample(gaussian(1.0), seeds=seeds)
    baseline = full_precision_baseline(gaussian(1.0), target=target)

    def left(k, **options):
        correction = runtime(seeds, interval=5, target=target, **options)
        return distance(sample(gaussian(1.0, k=k), correction, seeds), exact)

    assert left(0.1, baseline=baseline, slope=True) < share * left(0.1)


def test_a_failed_slope_estimate_is_clamped():
    """A full-precision slope near zero, or far from the quantized one, is not followed."""
    found = full_precision_baseline(gaussian(1.0))
    for own in (0.0, 1e-6, 1e6):
        slopes = dict.fromkeys(found.slope, torch.tensor(own))
        correction = runtime(interval=1, baseline=replace(found, slope=slopes), slope=True)
        x = sample(gaussian(1.0), correction)
        assert torch.isfinite(x).all()
        assert set(correction.slope_ratio.tolist()) <= set(SLOPE_RATIOS)


def test_variance_for_stochastic_sampling_excludes_the_models_own():
    noisy, seeds, sigma = generator_for(0, "quantization"), range(8), 0.5

    def quantized(x, t):
        return gaussian(1.0)(x, t) + sigma * torch.randn(x.shape, generator=noisy)

    baseline = full_precision_baseline(gaussian(1.0))
    correction = runtime(seeds, interval=1, baseline=baseline)
    sample(quantized, correction, seeds, eta=1.0)
    last = correction.deductible_variance(None)
    assert last.shape == (8,)
    assert last.mean().item() == pytest.approx(sigma**2, abs=0.05)
    assert runtime(deduct_variance=False).deductible_variance(None) is None


# ---- how much of a reading is believed ---------------------------------------------------


def with_gains(baseline, quantized, full, seeds=range(200, 216), **options):
    """The baseline with its gains, from the quantized model's own trajectories."""
    recorder, errors = runtime(seeds, interval=1, apply=False, **options), []

    def on_step(i, t, x, prediction):
        errors.append(StepError.of(round(float(t)), i, full(x, t), prediction))

    sample(quantized, recorder, seeds, on_step=on_step)
    gains = fit_gains(baseline, [(recorder.estimates, errors)], SLOPE_RATIOS)
    variances = {e.t: torch.zeros(()) for e in errors}  # what is planted here has none
    slope_gain = gains.pop("slope")
    return replace(baseline, gain=gains, slope_gain=slope_gain, largest_variance=variances)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("slope", "eta"), [(False, 0.0), (True, 0.0), (False, 1.0)])
@pytest.mark.parametrize("target", ["total", "injected"])
def test_a_model_without_noise_is_left_exactly_as_it_is(target, slope, eta, granularity):
    full = gaussian(1.0)
    baseline = with_gains(full_precision_baseline(full, target=target), full, full, target=target)
    options = {"interval": 1, "target": target, "granularity": granularity, "slope": slope}
    corrected = sample(full, runtime(baseline=baseline, **options), eta=eta)
    assert torch.equal(corrected, sample(full, eta=eta))


def test_a_gain_is_the_part_of_a_reading_that_is_real():
    """At the first step, where no shift has moved the trajectory yet: large ones are believed."""
    full, options = gaussian(1.0), {"target": "injected"}
    own = full_precision_baseline(full, **options)

    def gains(bias):
        found = with_gains(own, gaussian(1.0, bias=bias), full, **options).gain["channel"]
        assert all(0 <= gain <= 1 for gain in found.values())
        return [found[t].item() for t in sorted(found, reverse=True)]

    assert gains(4 * BIAS)[0] > 0.9
    assert sum(gains(0.02 * BIAS)) < 0.2  # mostly 0: chance does not count


def test_believed_readings_repair_more_than_published_ones():
    full, shifted = gaussian(1.0), gaussian(1.0, bias=BIAS)
    exact = sample(full)
    published = runtime(interval=5, target="injected")
    believed = runtime(
        interval=5,
        target="injected",
        granularity="channel",
        baseline=with_gains(
            full_precision_baseline(full, target="injected"), shifted, full, target="injected"
        ),
    )
    left = distance(sample(shifted, believed), exact)
    assert left < distance(sample(shifted), exact)
    assert left < distance(sample(shifted, published), exact)
