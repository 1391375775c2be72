"""Rectified flows: diffusers' own steps, levels, and corrections in the velocity.

Data N(MU, S^2) per element; the exact velocity is written out independently.
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from qncd_cli.correction.offline import AffineCorrection, PtqdCorrection
from qncd_cli.correction.runtime import RuntimeCorrection
from qncd_cli.correction.statistics import NoiseStatistics, timestep_key
from qncd_cli.errors import ConfigError
from qncd_cli.models.schedule import FROM_ONE, shifted
from qncd_cli.sampling.levels import plan_steps, supports_variance_deduction, with_timesteps
from qncd_cli.sampling.noise import generators_for
from qncd_cli.sampling.samplers import denoise, make_scheduler

SHAPE, STEPS, SEEDS = (3, 8, 8), 6, [3, 8]
MU, S = 0.3, 0.8
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
SCHNELL = {"_class_name": "FlowMatchFromOne"}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.9, "max_shift": 0.9}
SD3_DYNAMIC, DEV = {**SD3, **DYNAMIC}, {**SCHNELL, **DYNAMIC}
BIAS = torch.tensor([0.02, -0.05, 0.08]).view(1, 3, 1, 1)


def exact(x, t, s=S):
    """E[eps - x_0 | x] for x = (1 - sigma) x_0 + sigma eps."""
    sigma = float(t) / 1000
    gain = ((1 - sigma) * s * s) / ((1 - sigma) ** 2 * s * s + sigma**2)
    x0 = MU + gain * (x - (1 - sigma) * MU)
    eps = x if sigma == 1 else (x - (1 - sigma) * x0) / sigma
    return eps - x0


def noisy(x, t):
    return 1.1 * exact(x, t) + BIAS


def draw(predict, config=SD3, seeds=SEEDS, shape=SHAPE, **options):
    scheduler = make_scheduler("flow-euler", config)
    return denoise(predict, scheduler, STEPS, generators_for(seeds), shape, **options)


@pytest.mark.parametrize("config", [SD3, SD3_DYNAMIC, SCHNELL, DEV])
def test_steps_are_those_of_the_pipelines(config):
    options = {k: v for k, v in config.items() if k != "_class_name"}
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    from_one = torch.linspace(1, 1 / STEPS, STEPS).tolist()
    own = {"sigmas": from_one} if config["_class_name"] == FROM_ONE else {}
    scheduler.set_timesteps(STEPS, **own, mu=config.get("base_shift"))
    x = torch.cat([torch.randn((1, *SHAPE), generator=g) for g in generators_for(SEEDS)])
    for t in scheduler.timesteps:
        x = scheduler.step(exact(x, t), t, x).prev_sample
    torch.testing.assert_close(draw(exact, config), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [64, 1024, 4096])
def test_the_shift_is_the_pipelines(tokens):
    config = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    found = shifted(config, tokens, 1.15)
    assert found["base_shift"] == found["max_shift"] == pytest.approx(calculate_shift(tokens))
    assert shifted({"shift": 3.0}, tokens, 1.15) == {"shift": 3.0}


def test_a_flow_and_a_diffusion_scheduler_do_not_stand_in_for_each_other():
    with pytest.raises(ConfigError, match="ddim.*use flow-euler"):
        make_scheduler("ddim", SD3)
    with pytest.raises(ConfigError, match="flow-euler.*rectified flows"):
        make_scheduler("flow-euler", {"_class_name": "DDIMScheduler"})


class Watcher:
    """Changes nothing and remembers what it saw."""

    extra_calls = 0

    def __init__(self):
        self.after = []

    def tries(self, step):
        return False

    def correct(self, step, prediction):
        return prediction

    def observe(self, step, x_next, predict):
        self.after.append((step, x_next, predict))

    def deductible_variance(self, step):
        return None


def test_corrections_see_vp_scale_and_the_velocity():
    """A model of a point mass: x0 is MU, and the latent after a step is on the line to it."""
    watcher = Watcher()

    def point(x, t):
        return exact(x, t, 0.0)

    assert torch.equal(draw(point, correction=watcher), draw(point))
    assert watcher.after[0][0].abar_t == 0
    for step, x_next, predict in watcher.after:
        sigma = 1 / (1 + math.sqrt(step.abar_next / (1 - step.abar_next)))
        assert sigma * 1000 == pytest.approx(step.t_next, rel=1e-5)
        assert torch.allclose(step.x0, torch.full_like(step.x0, MU), atol=1e-5)
        eps = (x_next - math.sqrt(step.abar_next) * MU) / math.sqrt(1 - step.abar_next)
        assert torch.allclose(eps - MU, step.eps, atol=1e-4)
        z = torch.randn(2, *SHAPE)
        x_t = math.sqrt(step.abar_t) * MU + math.sqrt(1 - step.abar_t) * z
        assert torch.allclose(predict(x_t, torch.tensor(step.t)), z - MU, atol=1e-4)


@pytest.mark.parametrize("index", [0, 2, 4])
def test_an_estimate_reads_a_shift_as_far_as_theory_says(index):
    """(1 - w) (1 - rho) D of it, as in eps (noise_correction's docstring); nothing at sigma = 1."""
    shape, shift = (3, 64, 64), 0.2
    scheduler = make_scheduler("flow-euler", SD3)
    step = plan_steps(with_timesteps(scheduler, STEPS))[index]

    def planted(x, t):
        return exact(x, t) + shift * (float(t) == step.t)

    means = []
    for predict in (exact, planted):
        generators = generators_for([0], "correction")
        correction = RuntimeCorrection(generators, target="total", interval=1, apply=False)
        draw(predict, seeds=[0], shape=shape, correction=correction)
        means.append(correction.estimates[index].mean.mean().item())
    w = (1 - step.abar_t) / (step.abar_t * S * S + 1 - step.abar_t)
    levels = [math.sqrt((1 - a) / a) if a else math.inf for a in (step.abar_t, step.abar_next)]
    expected = (1 - w) * (1 - levels[1] / levels[0]) * shift
    assert means[1] - means[0] == pytest.approx(expected, abs=1e-5)
    assert index == 0 or expected > 0.003


@pytest.mark.parametrize("kind", [PtqdCorrection, AffineCorrection])
def test_prepared_statistics_take_planted_noise_out(kind):
    statistics = NoiseStatistics()

    def record(index, t, x, prediction):
        statistics.update(t, exact(x, t), prediction)

    draw(noisy, seeds=list(range(8)), on_step=record)
    tensors = statistics.finish()
    assert timestep_key(1000.0) in tensors["timesteps"]
    clean, without = draw(exact), draw(noisy)
    with_it = draw(noisy, correction=kind(tensors))
    assert (with_it - clean).abs().max() < 0.1 * (without - clean).abs().max()


def test_an_unquantized_model_is_left_alone():
    statistics = NoiseStatistics()
    draw(exact, on_step=lambda i, t, x, p: statistics.update(t, exact(x, t), p))
    correction = PtqdCorrection(statistics.finish())
    assert torch.equal(draw(exact, correction=correction), draw(exact))


def test_each_sample_is_the_same_in_any_batch():
    def one(seeds):
        correction = RuntimeCorrection(generators_for(seeds, "correction"), interval=2)
        return draw(noisy, seeds=seeds, correction=correction)

    assert torch.equal(one([0, 1, 2])[1:2], one([1]))


def test_noise_injected_by_a_stochastic_flow_is_not_known():
    assert supports_variance_deduction(make_scheduler("flow-euler", SD3))
    stochastic = make_scheduler("flow-euler", {**SD3, "stochastic_sampling": True})
    assert not supports_variance_deduction(stochastic)
