"""The run-time estimate as published: when it is made, of what, and which predictions it changes.

`published` is the loop of the published code (its PLMS sampler, 2024-08-23), written from its
description in docs/method.md without anything of qncd's but the noise it starts from.
"""

from __future__ import annotations

import math

import pytest
import torch
from analytic import BIAS, LDM, SHAPE, gaussian, runtime

from qncd_cli.errors import ConfigError
from qncd_cli.sampling.levels import plan_steps, with_timesteps
from qncd_cli.sampling.noise import generators_for, initial_noise
from qncd_cli.sampling.samplers import denoise, make_scheduler

SEEDS = [3, 4]
MODEL = gaussian(0.8, bias=BIAS, k=0.03)
PUBLISHED = {"target": "injected", "granularity": "batch", "interval": 10}


def published(predict, steps, interval):
    """Latents [N, ...] of the published PLMS loop; the steps (from 1) at which it estimates."""
    scheduler = make_scheduler("plms", LDM)
    scheduler.set_timesteps(steps)
    times = [int(t) for t in dict.fromkeys(scheduler.timesteps.tolist())]
    abar = scheduler.alphas_cumprod
    draws = generators_for(SEEDS, "correction")
    x = initial_noise(generators_for(SEEDS), SHAPE)
    history, scalar, at = [], 0.0, []
    for step, t in enumerate(times, 1):
        s = times[step] if step < len(times) else None
        a_t, a_s = abar[t], abar[s] if s is not None else scheduler.final_alpha_cumprod

        def ddim(eps, x=x, a_t=a_t, a_s=a_s):
            x0 = (x - (1 - a_t).sqrt() * eps) / a_t.sqrt()
            return a_s.sqrt() * x0 + (1 - a_s).sqrt() * eps

        def following(eps, s=s, t=t, ddim=ddim):
            """The step with the multistep formula; eps: corrected or not."""
            if len(history) == 0:
                after = predict(ddim(eps), torch.tensor(s))
                return ddim((eps + after) / 2)
            if len(history) == 1:
                return ddim((3 * eps - history[-1]) / 2)
            if len(history) == 2:
                return ddim((23 * eps - 16 * history[-1] + 5 * history[-2]) / 12)
            newest = 55 * eps - 59 * history[-1] + 37 * history[-2] - 9 * history[-3]
            return ddim(newest / 24)

        due = (step - 2) % interval == interval // 2
        if due:
            scalar = 0.0
        eps = predict(x, torch.tensor(t)) - scalar
        x_next = following(eps)
        if due:
            at.append(step)
            z = torch.cat([torch.randn((1, *SHAPE), generator=g) for g in draws])
            up = (a_t / a_s).sqrt() * x_next + (1 - a_t / a_s).sqrt() * z
            scalar = (predict(up, torch.tensor(t)) - z).mean()
            eps = eps - scalar
            x_next = following(eps)
        history.append(eps)
        x = x_next
    return x, at


@pytest.mark.parametrize(("steps", "interval"), [(50, 10), (20, 10), (20, 4), (25, 7)])
def test_the_sampler_of_the_published_code_gives_the_same_latents(steps, interval):
    first = interval // 2 + 1
    correction = runtime(SEEDS, **{**PUBLISHED, "interval": interval}, first=first, repeat=True)
    scheduler, generators = make_scheduler("plms", LDM), generators_for(SEEDS)
    ours = denoise(MODEL, scheduler, steps, generators, SHAPE, correction=correction)
    theirs, at = published(MODEL, steps, interval)
    assert correction.extra_calls == len(at)
    if (steps, interval) == (50, 10):
        assert at == [7, 17, 27, 37, 47]
    plain = denoise(MODEL, scheduler, steps, generators_for(SEEDS), SHAPE)
    moved = (theirs - plain).square().mean().sqrt()
    assert (ours - theirs).abs().max() < 1e-3 * moved, "far below what the correction does"


def traced(correction, scheduler="ddim", eta=0.0, steps=20):
    """Inputs and timesteps of every call, and what each step used."""
    calls, used = [], []

    def predict(x, t):
        calls.append((x, float(t)))
        return MODEL(x, t)

    def on_step(index, t, x, prediction):
        used.append(prediction)

    chosen = make_scheduler(scheduler, LDM)
    generators = generators_for(SEEDS)
    options = {"eta": eta, "correction": correction, "on_step": on_step}
    latents = denoise(predict, chosen, steps, generators, SHAPE, **options)
    return latents, calls, used


def test_the_step_of_an_estimate_is_made_twice_of_one_prediction():
    """A trial without any correction, then the same prediction less the new scalar."""
    correction = runtime(SEEDS, **PUBLISHED, first=6, repeat=True)
    _, calls, used = traced(correction)
    times = [t for _, t in calls]
    assert len(calls) == 22 and correction.extra_calls == 2
    assert times[6] == times[7] and times[17] == times[18], "calls of the steps 7 and 17, from 1"
    plan = plan_steps(with_timesteps(make_scheduler("ddim", LDM), 20))
    raw = [MODEL(*call) for call in (calls[:7] + calls[8:18] + calls[19:])]
    taken = [(r - u).flatten() for r, u in zip(raw, used, strict=True)]
    assert all(gone.abs().max() == 0 for gone in taken[:6]), "nothing to subtract yet"
    scalars = [float(gone.double().mean()) for gone in taken]
    assert all(gone.std() < 1e-6 for gone in taken[6:]), "one number for the whole batch"
    assert (
        len({round(s, 6) for s in scalars[6:16]}) == len({round(s, 6) for s in scalars[16:]}) == 1
    )
    assert abs(scalars[6] - scalars[16]) > 1e-4
    at_7 = plan[6]
    x, e = calls[6][0], raw[6]
    x0 = (x - math.sqrt(1 - at_7.abar_t) * e) / math.sqrt(at_7.abar_t)
    trial = math.sqrt(at_7.abar_next) * x0 + math.sqrt(1 - at_7.abar_next) * e
    ratio = at_7.abar_t / at_7.abar_next
    z = (calls[7][0] - math.sqrt(ratio) * trial) / math.sqrt(1 - ratio)
    draws = generators_for(SEEDS, "correction")
    expected = torch.cat([torch.randn((1, *SHAPE), generator=g) for g in draws])
    assert torch.allclose(z, expected, atol=1e-4), "what is diffused up is the trial's result"


def test_no_earlier_estimate_enters_the_trial():
    """With an estimate at every step, the second estimate looks at an uncorrected step."""
    every = runtime(SEEDS, **{**PUBLISHED, "interval": 1}, first=0, repeat=True)
    _, calls, used = traced(every, steps=4)
    assert len(calls) == 8
    for step in range(4):
        gone = MODEL(*calls[2 * step]) - used[step]
        own = every.estimates[step].mean.mean()
        assert torch.allclose(gone, own.expand_as(gone), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "eta"),
    [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("plms", 0.0), ("pndm", 0.0), ("unipc", 0.0)]
    + [("dpmsolver++", 0.0), ("euler", 0.0)],
)
def test_a_trial_leaves_no_trace_in_scheduler_or_generators(name, eta):
    """Steps made on trial without a correction that acts give the same bits as none."""
    looking = runtime(SEEDS, **{**PUBLISHED, "interval": 3}, first=1, repeat=True, apply=False)
    looked, _, _ = traced(looking, name, eta)
    plain, _, _ = traced(None, name, eta)
    assert looking.extra_calls >= 6
    assert torch.equal(looked, plain)


def test_the_total_target_does_not_look_at_a_latent_without_noise():
    """The last step of a schedule that ends at abar 1."""
    to_one = {**LDM, "set_alpha_to_one": True}
    options = {"interval": 1, "repeat": True}
    counts = {}
    for target in ("injected", "total"):
        correction = runtime(SEEDS, target=target, **options)
        generators = generators_for(SEEDS)
        scheduler = make_scheduler("ddim", to_one)
        latents = denoise(MODEL, scheduler, 5, generators, SHAPE, correction=correction)
        assert latents.isfinite().all()
        counts[target] = correction.extra_calls
    assert counts == {"injected": 5, "total": 4}


def test_a_first_step_before_the_trajectory_is_refused():
    with pytest.raises(ConfigError, match="first"):
        runtime(first=-1)


def early(bias):
    """The exact denoiser, with a shift of its prediction in the first six steps alone."""
    exact, shifted = gaussian(0.8), gaussian(0.8, bias=bias)
    last = plan_steps(with_timesteps(make_scheduler("ddim", LDM), 20))[5].t
    return lambda x, t: (shifted if float(t) >= last else exact)(x, t)


def test_an_estimate_takes_the_drift_of_earlier_steps_for_noise_of_the_opposite_sign():
    """E[q] = w sqrt(abar_t / abar_s) delta / sqrt(1 - abar_t) where the step itself is exact."""
    seeds, bias, v = range(8), 0.3, 0.8**2
    plan = plan_steps(with_timesteps(make_scheduler("ddim", LDM), 20))

    def draw(predict, correction=None):
        seen, scheduler = [], make_scheduler("ddim", LDM)
        options = {"correction": correction, "on_step": lambda i, t, x, p: seen.append(x)}
        return denoise(predict, scheduler, 20, generators_for(seeds), SHAPE, **options), seen

    exact, exact_inputs = draw(gaussian(0.8))
    plain, inputs = draw(early(bias))
    drift = float((inputs[7] - exact_inputs[7]).double().mean())
    assert drift < -0.1, "eps enters the latent with a negative coefficient"
    results = {}
    for first in (0, 6):
        estimate = runtime(seeds, **PUBLISHED, first=first, repeat=True)
        results[first], _ = draw(early(bias), estimate)
        results[first, "read"] = float(estimate.estimates[0].mean.double().mean())
    step = plan[6]
    a, ratio = step.abar_t, step.abar_t / step.abar_next
    w = (1 - a) / (a * v + 1 - a)
    chance = 1 / math.sqrt(exact.numel())
    expected = w * math.sqrt(ratio) * drift / math.sqrt(1 - a)
    assert results[6, "read"] == pytest.approx(expected, abs=4 * chance)
    assert results[6, "read"] < 0 < results[0, "read"]
    distances = {k: float((x - exact).norm()) for k, x in results.items() if k in (0, 6)}
    before = float((plain - exact).norm())
    assert distances[0] < 0.8 * before < before < distances[6]
