"""Run-time estimates of a part of the batch alone: whose they are, and what the others take."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from analytic import BIAS, DDIM, STEPS, full_precision_baseline, gaussian, runtime, sample

from qncd_cli.correction.runtime import estimated_of, reduce_mean, renoise
from qncd_cli.errors import ConfigError
from qncd_cli.sampling.levels import plan_steps, with_timesteps
from qncd_cli.sampling.noise import generators_for

SEEDS = range(5)
MODEL = gaussian(1.0, bias=BIAS, k=0.05)


@pytest.mark.parametrize(
    ("samples", "part", "estimated"),
    [(5, 1.0, 5), (5, 0.5, 3), (5, 0.01, 1), (100, 0.07, 7), (100, 0.071, 8), (1, 1e-12, 1)],
)
def test_the_part_is_rounded_up(samples, part, estimated):
    assert estimated_of(samples, part) == estimated


@pytest.mark.parametrize("part", [0.0, -0.5, 1.01, math.nan])
def test_what_is_no_part_is_refused(part):
    with pytest.raises(ConfigError, match="part"):
        runtime(part=part)


@pytest.mark.parametrize("granularity", ["tensor", "batch"])
def test_the_whole_batch_is_read_as_published(granularity):
    """Bit by bit: z from every sample's own generator, e^ - z, its mean, nothing between."""
    options = {"target": "injected", "interval": STEPS, "granularity": granularity}
    correction = runtime(SEEDS, part=1.0, **options)
    seen = []

    def predict(x, t):
        seen.append((x, t))
        return MODEL(x, t)

    sample(predict, correction, SEEDS)
    step = plan_steps(with_timesteps(DDIM, STEPS, 0.0), 0.0)[0]
    x_t, t = seen[1]  # of the first step comes the first call, then the extra one
    z = torch.cat(
        [torch.randn((1, *x_t.shape[1:]), generator=g) for g in generators_for(SEEDS, "correction")]
    )
    x_s = next_of(seen[0][0], MODEL(*seen[0]), seen[0][1])
    assert torch.equal(x_t, renoise(x_s, step.abar_t, step.abar_next, z))
    assert torch.equal(correction.q_mean, reduce_mean(MODEL(x_t, t) - z, granularity))


def test_the_published_estimate_is_one_number_for_all_that_is_drawn_together():
    """Mean and deviation of a reading that is chance alone: 1 / sqrt(what is averaged)."""
    q = torch.randn((50, 3, 8, 8), generator=torch.Generator().manual_seed(7))
    batch, own = reduce_mean(q, "batch"), reduce_mean(q, "tensor")
    assert batch.shape == own.shape == (50, 1, 1, 1)
    assert torch.allclose(batch, q.double().mean().float().expand_as(batch), rtol=0, atol=1e-7)
    assert batch.unique().numel() == 1
    assert own.std() == pytest.approx(1 / math.sqrt(3 * 8 * 8), rel=0.2)
    assert batch.abs().max() < 4 / math.sqrt(q.numel())
    part = runtime(SEEDS, part=0.4, granularity="batch", target="injected", interval=STEPS)
    sample(MODEL, part, SEEDS)
    assert len(part.q_mean) == len(SEEDS)
    assert torch.allclose(part.q_mean, part.q_mean[:1].expand_as(part.q_mean), rtol=0, atol=1e-7)


def test_samples_of_a_batch_estimate_depend_on_their_batch():
    def draw(seeds):
        return sample(MODEL, runtime(seeds, granularity="batch", interval=3), seeds)

    four, six = draw([0, 1, 2, 3]), draw([0, 1, 2, 3, 4, 5])
    assert not any(torch.equal(a, b) for a, b in zip(four, six[:4], strict=True))
    assert torch.equal(draw([0, 1, 2, 3]), four)


def test_a_batch_estimate_leaves_the_full_precision_model_as_it_is():
    """Against a baseline whose gains found nothing to correct."""
    exact = gaussian(1.0)
    baseline = full_precision_baseline(exact, target="total")
    gains = {g: dict.fromkeys(baseline.mean, torch.tensor(0.0)) for g in ("tensor", "channel")}
    baseline = dataclasses.replace(baseline, gain=gains)
    options = {"granularity": "batch", "baseline": baseline, "interval": 1}
    corrected = sample(exact, runtime(SEEDS, **options), SEEDS)
    assert torch.equal(corrected, sample(exact, None, SEEDS))


def next_of(x, prediction, t):
    scheduler = with_timesteps(DDIM, STEPS, 0.0)
    return scheduler.step(prediction, t, x, eta=0.0).prev_sample


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("target", ["total", "injected"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_first_samples_keep_their_own_and_the_rest_takes_the_mean(
    granularity, target, baseline
):
    options = {"granularity": granularity, "target": target, "interval": 3}
    if baseline:
        options["baseline"] = full_precision_baseline(gaussian(1.0), target=target)
        options["slope"] = True
    rows = []

    def predict(x, t):
        rows.append(len(x))
        return MODEL(x, t)

    whole, part = runtime(SEEDS, **options), runtime(SEEDS, part=0.3, **options)
    every, some = sample(MODEL, whole, SEEDS), sample(predict, part, SEEDS)
    assert torch.equal(some[:2], every[:2])
    assert not torch.equal(some[2:], every[2:])
    assert sorted(rows) == [2] * part.extra_calls + [5] * STEPS
    assert part.extra_calls == whole.extra_calls
    assert all(len(e.mean) == len(e.variance) == len(e.slope) == 2 for e in part.estimates)
    assert torch.equal(part.q_mean[:2], whole.q_mean[:2])
    assert torch.allclose(part.q_mean[2:], part.q_mean[:2].mean(0).expand(3, -1, 1, 1), atol=1e-6)
    if baseline:
        assert part.slope_ratio.shape == (5,)


def test_variance_is_deducted_from_all():
    correction = runtime(SEEDS, part=0.4, interval=1)
    assert torch.isfinite(sample(MODEL, correction, SEEDS, eta=1.0)).all()
    variance = correction.deductible_variance(None)
    assert variance.shape == (5,)
    assert torch.allclose(variance[2:], variance[:2].mean().expand(3))


def test_only_the_first_samples_do_not_depend_on_the_batch():
    def draw(seeds):
        return sample(MODEL, runtime(seeds, part=0.5, interval=3), seeds)

    four, six = draw([0, 1, 2, 3]), draw([0, 1, 2, 3, 4, 5])
    assert torch.equal(four[:2], six[:2])
    assert not torch.equal(four[2], six[2])  # has an estimate of its own in the larger batch
    assert not torch.equal(four[3], six[3])
    assert torch.equal(draw([0, 1, 2, 3]), four)
