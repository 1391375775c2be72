"""The loop against diffusers' own, schedulers against each other, corrections around steps."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from diffusers import DDIMScheduler

from qncd_cli.correction.runtime import RuntimeCorrection
from qncd_cli.errors import ConfigError
from qncd_cli.sampling import levels
from qncd_cli.sampling.levels import eps_coefficient, plan_steps, supports_variance_deduction
from qncd_cli.sampling.noise import generators_for, initial_noise
from qncd_cli.sampling.samplers import SCHEDULERS, denoise, make_scheduler

# diffusers 0.42 under numpy 2: np.array(tensor); not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SHAPE = (3, 8, 8)
STEPS = 8
LDM = {
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "prediction_type": "epsilon",
}
UNPLANNED = [n for n, (kind, _) in SCHEDULERS.items() if kind in levels.UNPLANNED]
VP = [n for n in SCHEDULERS if n != "flow-euler" and n not in UNPLANNED]  # test_flow.py
SDE = {"algorithm_type": "sde-dpmsolver++"}
CASES = [(name, 0.0, {}) for name in VP] + [
    ("ddim", 1.0, {}),
    ("ddim", 0.0, {"clip_sample": True}),
    ("ddim", 0.5, {"timestep_spacing": "trailing"}),
    ("euler", 0.0, {"timestep_spacing": "leading"}),
    ("dpmsolver++", 0.0, SDE),
]


def guided(x, t):
    """Elementwise stand-in for a guided denoiser: uncond + 3 (cond - uncond)."""
    phase = float(t) / 1000
    uncond, cond = torch.tanh(x) * 0.9, torch.sin(x + phase)
    return uncond + 3.0 * (cond - uncond)


def sample(name, seeds, eta=0.0, config=(), **options):
    scheduler = make_scheduler(name, {**LDM, **dict(config)})
    return denoise(guided, scheduler, STEPS, generators_for(seeds), SHAPE, eta=eta, **options)


@pytest.mark.parametrize(
    ("name", "eta", "config"), [*CASES, *((name, 0.0, {}) for name in UNPLANNED), ("tcd", 0.3, {})]
)
def test_denoise_equals_a_plain_diffusers_loop(name, eta, config):
    scheduler = make_scheduler(name, {**LDM, **config})
    scheduler.set_timesteps(STEPS)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 9)]
    x = torch.cat([torch.randn((1, *SHAPE), generator=g) for g in generators])
    x = x * scheduler.init_noise_sigma
    takes = inspect.signature(scheduler.step).parameters
    extra = {"eta": eta, "generator": generators}
    extra = {key: value for key, value in extra.items() if key in takes}
    for t in scheduler.timesteps:
        x = scheduler.step(guided(scheduler.scale_model_input(x, t), t), t, x, **extra).prev_sample
    assert torch.isfinite(x).all()
    assert torch.equal(sample(name, [4, 9], eta, config), x)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("name", "eta", "config"), CASES)
def test_a_sample_is_the_same_alone_and_in_a_batch(name, eta, config, corrected):
    seeds = [0, 1, 2, 3, 4]

    def draw(batch):
        options = {"deduct_variance": name != "dpmsolver++", "interval": 2, "target": "injected"}
        correction = RuntimeCorrection(generators_for(batch, "correction"), **options)
        return sample(name, batch, eta, config, correction=correction if corrected else None)

    batch = draw(seeds)
    assert torch.equal(draw([3]), batch[3:4])
    assert torch.equal(draw([1, 4]), batch[[1, 4]])


@pytest.mark.parametrize("name", VP)
def test_no_state_passes_from_batch_to_batch(name):
    scheduler = make_scheduler(name, LDM)

    def draw(batch):
        correction = RuntimeCorrection(generators_for(batch, "correction"), interval=2)
        generators = generators_for(batch)
        return denoise(guided, scheduler, STEPS, generators, SHAPE, correction=correction)

    first, second = draw([0, 1]), draw([2, 3])
    assert torch.equal(second, draw([2, 3]))
    assert torch.equal(first, draw([0, 1]))
    assert not torch.equal(first, second)
    assert scheduler.num_inference_steps is None  # a copy did the work


def test_correction_changes_the_result_but_not_the_initial_noise():
    seen = {}
    for name, correction in (
        ("without", None),
        ("with", RuntimeCorrection(generators_for([5], "correction"), interval=2)),
    ):
        inputs = seen.setdefault(name, [])
        sample("ddim", [5], correction=correction, on_step=lambda i, t, x, e, s=inputs: s.append(x))
    assert len(seen["with"]) == STEPS
    assert torch.equal(seen["with"][0], initial_noise(generators_for([5]), SHAPE))
    assert torch.equal(seen["with"][1], seen["without"][1])  # step 0 is never corrected
    assert not torch.equal(seen["with"][2], seen["without"][2])


class Recorder:
    """A correction that only looks."""

    extra_calls = 0

    def __init__(self):
        self.before, self.after = [], []

    def tries(self, step):
        return False

    def correct(self, step, prediction):
        self.before.append(step)
        return prediction

    def observe(self, step, x_next, predict):
        self.after.append((step, x_next))

    def deductible_variance(self, step):
        return None


@pytest.mark.parametrize(("name", "eta", "config"), CASES)
def test_a_looking_correction_changes_nothing(name, eta, config):
    recorder = Recorder()
    x = sample(name, [1], eta, config, correction=recorder)
    assert torch.equal(x, sample(name, [1], eta, config))
    assert len(recorder.after) == len(recorder.before) - 1
    assert recorder.before[-1].t_next is None


@pytest.mark.parametrize("name", VP)
def test_latents_follow_an_exact_path_at_the_levels_of_the_plan(name):
    """A point mass at mu: x_s = sqrt(abar_s) mu + sqrt(1 - abar_s) e with e constant in time.

    Every deterministic scheduler follows that line exactly; it pins abar_next and VP scale.
    """
    mu, recorder, steps = 0.7, Recorder(), 10  # T // steps is even: PNDM's half steps exist
    scheduler = make_scheduler(name, {**LDM, "timestep_spacing": "leading"})
    scheduler.set_timesteps(steps)
    abar = {s.t: s.abar_t for s in plan_steps(scheduler)}

    def exact(x, t):
        a = abar[float(t)]
        return (x - math.sqrt(a) * mu) / math.sqrt(1 - a)

    x = denoise(exact, scheduler, steps, generators_for([0]), SHAPE, correction=recorder)
    for step, x_next in recorder.after:
        assert torch.allclose(step.x0, torch.full_like(step.x0, mu), atol=2e-3)
        if name in ("ddpm", "euler-ancestral"):
            continue
        e = (x_next - math.sqrt(step.abar_next) * mu) / math.sqrt(1 - step.abar_next)
        assert torch.allclose(e, step.eps, atol=2e-3)
    if name in ("ddim", "ddpm", "euler"):
        assert torch.allclose(x, torch.full_like(x, mu), atol=0.1)


def test_euler_levels_are_ddim_levels():
    plans = []
    for name in ("ddim", "euler"):
        scheduler = make_scheduler(name, {**LDM, "timestep_spacing": "leading"})
        scheduler.set_timesteps(STEPS)
        plans.append(plan_steps(scheduler))
    for ddim, euler in zip(*plans, strict=True):
        assert (ddim.t, ddim.t_next) == (euler.t, euler.t_next)
        assert euler.abar_t == pytest.approx(ddim.abar_t, rel=1e-5)
        if ddim.t_next is not None:
            assert euler.abar_next == pytest.approx(ddim.abar_next, rel=1e-5)
    assert plans[1][-1].abar_next == 1.0


def test_ddim_arrives_one_stride_below_whatever_the_spacing():
    """With 'trailing' spacing and 7 steps, t - T // 7 is not the next timestep."""
    scheduler = make_scheduler("ddim", {**LDM, "timestep_spacing": "trailing"})
    scheduler.set_timesteps(7)
    first = plan_steps(scheduler)[0]
    abar = scheduler.alphas_cumprod
    assert first.abar_next == pytest.approx(abar[int(first.t) - 1000 // 7].item())
    assert first.abar_next != pytest.approx(abar[int(first.t_next)].item(), rel=1e-6)


def test_plms_repeats_a_level():
    scheduler = make_scheduler("plms", LDM)
    scheduler.set_timesteps(STEPS)
    plan = plan_steps(scheduler)
    assert len(plan) == STEPS + 1
    assert plan[1].t == plan[2].t and plan[1].abar_next == plan[1].abar_t
    assert plan[0].abar_next == plan[1].abar_t < plan[2].abar_next


class Deduct(Recorder):
    """Claims a constant variance of the prediction error."""

    def __init__(self, variance):
        super().__init__()
        self.variance = variance

    def deductible_variance(self, step):
        return torch.tensor([self.variance])


@pytest.mark.parametrize(
    ("name", "eta", "config"),
    [
        ("ddim", 1.0, {}),
        ("ddim", 0.6, {}),
        ("ddpm", 0.0, {}),
        ("ddpm", 0.0, {"variance_type": "fixed_large"}),
        ("euler-ancestral", 0.0, {"timestep_spacing": "trailing"}),
    ],
)
@pytest.mark.parametrize("variance", [0.01, 1e6])
def test_deduction_reduces_the_injected_noise_as_predicted(name, eta, config, variance):
    """x_s - mean must have variance sigma^2 - c^2 var_q (0 at least); the mean comes from c."""
    shape = (4, 64, 64)
    scheduler = make_scheduler(name, {**LDM, **config})
    recorder = Deduct(variance)
    denoise(guided, scheduler, STEPS, generators_for([0]), shape, eta=eta, correction=recorder)
    for step, x_next in recorder.after:
        mean = math.sqrt(step.abar_next / step.abar_t) * step.x
        mean = mean + step.eps_coefficient * step.eps
        expected = max(step.sigma**2 - step.eps_coefficient**2 * variance, 0.0)
        assert step.sigma > 0
        assert (x_next - mean).var().item() == pytest.approx(expected, rel=0.05, abs=1e-9)


def test_deduction_of_zero_changes_nothing_and_draws_stay_put():
    plain = sample("ddim", [2, 3], 1.0)
    assert torch.equal(sample("ddim", [2, 3], 1.0, correction=Deduct(0.0)), plain)
    assert not torch.equal(sample("ddim", [2, 3], 1.0, correction=Deduct(0.01)), plain)


def test_deduction_is_an_error_where_the_noise_is_not_known():
    scheduler = make_scheduler("dpmsolver++", {**LDM, **SDE})
    assert not supports_variance_deduction(scheduler)
    with pytest.raises(ConfigError, match="cannot be deducted"):
        denoise(guided, scheduler, 4, generators_for([0]), SHAPE, correction=Deduct(0.1))
    for name in VP:
        assert supports_variance_deduction(make_scheduler(name, LDM), 1.0)


def test_eps_coefficient_is_the_derivative_of_a_ddim_step():
    scheduler = DDIMScheduler(**LDM)
    scheduler.set_timesteps(STEPS)
    t, x = scheduler.timesteps[3], torch.zeros(1, 1)
    step = plan_steps(scheduler)[3]
    moved = scheduler.step(torch.ones(1, 1), t, x).prev_sample.item()
    assert eps_coefficient(step.abar_t, step.abar_next, 0.0) == pytest.approx(moved, rel=1e-5)
    assert step.eps_coefficient == pytest.approx(moved, rel=1e-5)


def test_make_scheduler_keeps_the_models_config():
    scheduler = make_scheduler("euler", DDIMScheduler(**LDM, timestep_spacing="trailing").config)
    assert type(scheduler).__name__ == "EulerDiscreteScheduler"
    assert scheduler.config.beta_end == LDM["beta_end"]
    assert scheduler.config.timestep_spacing == "trailing"
    assert make_scheduler("plms", LDM).config.skip_prk_steps


def test_errors_say_what_to_do():
    with pytest.raises(ConfigError, match="did you mean 'ddim'.*plms"):
        make_scheduler("dim", LDM)
    with pytest.raises(ConfigError, match="no eta"):
        sample("euler", [0], eta=0.5)
    with pytest.raises(ConfigError, match="sampling.steps is 0"):
        denoise(guided, make_scheduler("ddim", LDM), 0, generators_for([0]), SHAPE)
    with pytest.raises(ConfigError, match="at least one seed"):
        sample("ddim", [])
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ConfigError, match="without any signal"):
        sample("ddim", [0], config=zero_snr, correction=Recorder())
