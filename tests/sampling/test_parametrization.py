"""Models that predict x_0 or v: the same conversions as diffusers', the same corrections as eps.

Data N(MU, S^2) per element: eps, x_0 and v of the exact denoiser are written out independently.
"""

from __future__ import annotations

import math

import pytest
import torch

from qncd_cli.correction.baseline import EstimatorBaseline
from qncd_cli.correction.offline import AffineCorrection, PtqdCorrection
from qncd_cli.correction.runtime import RuntimeCorrection
from qncd_cli.correction.statistics import NoiseStatistics
from qncd_cli.errors import ConfigError
from qncd_cli.sampling.levels import plan_steps, with_timesteps
from qncd_cli.sampling.noise import generator_for, generators_for
from qncd_cli.sampling.parametrization import PARAMETRIZATIONS, to_corrected, with_corrected
from qncd_cli.sampling.samplers import denoise, make_scheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE, STEPS, SEEDS = (3, 8, 8), 6, [3, 8]
MU, S = 0.3, 0.8
LDM = {
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "timestep_spacing": "leading",
}
SAMPLERS = [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("dpmsolver++", 0.0), ("euler", 0.0)]
SAMPLERS += [("unipc", 0.0)]
BIAS = torch.tensor([0.02, -0.05, 0.08]).view(1, 3, 1, 1)
OTHERS = ["sample", "v_prediction"]


def scheduler_for(name, kind):
    return make_scheduler(name, {**LDM, "prediction_type": kind})


def levels(scheduler, eta=0.0):
    return {step.t: step.abar_t for step in plan_steps(with_timesteps(scheduler, STEPS, eta))}


def in_kind(eps, x, a, kind):
    """The prediction about x at level a that says eps, by its definition."""
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    v = math.sqrt(a) * eps - math.sqrt(1 - a) * x0
    return {"epsilon": eps, "sample": x0, "v_prediction": v}[kind]


def gaussian(abar, kind, s=S, k=0.0, bias=0.0):
    """Exact denoiser with planted noise in eps, eps~ = (1 + k) eps + bias, as a model of `kind`."""

    def predict(x, t):
        a = abar[float(t)]
        eps = math.sqrt(1 - a) * (x - math.sqrt(a) * MU) / (a * s * s + 1 - a)
        return in_kind((1 + k) * eps + bias, x, a, kind)

    return predict


def draw(name, kind, eta=0.0, correction=None, on_step=None, seeds=SEEDS, **planted):
    scheduler = scheduler_for(name, kind)
    predict = gaussian(levels(scheduler), kind, **planted)
    options = {"eta": eta, "correction": correction, "on_step": on_step}
    return denoise(predict, scheduler, STEPS, generators_for(seeds), SHAPE, **options)


def statistics(name, eta, quantize):
    """Of eps~ = quantize(eps), along the exact trajectories of other seeds."""
    found = NoiseStatistics()
    noise = generator_for(0, "quantization")

    def on_step(i, t, x, eps):
        found.update(t, eps, quantize(eps, noise))

    draw(name, "epsilon", eta, on_step=on_step, seeds=range(20, 24))
    return found.finish()


def planted(eps, noise):
    return 0.94 * eps + BIAS + 0.1 * torch.randn(eps.shape, generator=noise)


def correction_for(method, name, eta):
    """A fresh correction; `runtime slope` also with the baselines of the exact model."""
    if method == "ptqd":
        return PtqdCorrection(statistics(name, eta, planted))
    if method == "affine":
        return AffineCorrection(statistics(name, eta, planted))
    options = {"interval": 2, "granularity": "channel"}
    if method == "runtime slope":
        recorder = RuntimeCorrection(generators_for([9], "baseline"), interval=1, apply=False)
        draw(name, "epsilon", eta, recorder, seeds=[9])
        options |= {"baseline": EstimatorBaseline.of(recorder.estimates), "slope": True}
    return RuntimeCorrection(generators_for(SEEDS, "correction"), **options)


METHODS = ["ptqd", "affine", "runtime", "runtime slope"]


# ---- the conversions -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_conversions_invert_the_definitions_at_any_shape_and_level(kind):
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        rank = int(torch.randint(2, 6, (), generator=generator))
        shape = torch.randint(1, 6, (rank,), generator=generator).tolist()
        x, eps, wanted = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        a = 0.002 + 0.996 * torch.rand((), generator=generator, dtype=torch.float64).item()
        prediction = in_kind(eps, x, a, kind)
        assert torch.allclose(to_corrected(prediction, x, a, kind), eps)
        changed = with_corrected(prediction, eps, wanted, a, kind)
        assert torch.allclose(changed, in_kind(wanted, x, a, kind))
        assert torch.equal(with_corrected(prediction, eps, eps, a, kind), prediction)


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_to_corrected_agrees_with_ddims_own_conversion(kind):
    """DDIM reports x_0; its eps follows from x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps."""
    scheduler = with_timesteps(scheduler_for("ddim", kind), STEPS)
    x, prediction = torch.randn(2, 1, *SHAPE, generator=generator_for(1))
    for step in plan_steps(scheduler):
        x0 = scheduler.step(prediction, int(step.t), x).pred_original_sample
        eps = (x - math.sqrt(step.abar_t) * x0) / math.sqrt(1 - step.abar_t)
        assert torch.allclose(to_corrected(prediction, x, step.abar_t, kind), eps, atol=1e-4)


# ---- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("method", ["none", *METHODS])
@pytest.mark.parametrize(("name", "eta"), SAMPLERS)
def test_the_parametrization_does_not_change_a_corrected_trajectory(name, eta, method, kind):
    paths = []
    for model in ("epsilon", kind):
        correction = None if method == "none" else correction_for(method, name, eta)
        seen = []
        x = draw(
            name,
            model,
            eta,
            correction,
            on_step=lambda i, t, x, p, seen=seen: seen.append(x),
            k=0.05,
            bias=BIAS,
        )
        paths.append(torch.stack([*seen, x]))
    assert torch.allclose(*paths, atol=2e-4)
    if method != "none":
        assert not torch.allclose(paths[1], draw_path(name, kind, eta), atol=1e-2)


def draw_path(name, kind, eta):
    """The uncorrected path of the same noisy model."""
    seen = []
    x = draw(name, kind, eta, on_step=lambda i, t, x, p: seen.append(x), k=0.05, bias=BIAS)
    return torch.stack([*seen, x])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("method", ["ptqd", "affine"])
def test_plms_is_corrected_as_if_inside_the_model(method, kind):
    """diffusers' PNDM averages v over steps before it converts: v and eps take different paths.

    A correction in the loop must equal one that the model applies to its own prediction.
    """
    scheduler, correction = scheduler_for("plms", kind), correction_for(method, "plms", 0.0)
    steps = {step.t: step for step in plan_steps(with_timesteps(scheduler, STEPS))}
    noisy = gaussian(levels(scheduler), kind, k=0.05, bias=BIAS)

    def corrected(x, t):
        step = steps[float(t)]
        eps = to_corrected(noisy(x, t), x, step.abar_t, kind)
        return in_kind(correction.correct(step, eps), x, step.abar_t, kind)

    inside = denoise(corrected, scheduler, STEPS, generators_for(SEEDS), SHAPE)
    assert torch.allclose(draw("plms", kind, 0.0, correction, k=0.05, bias=BIAS), inside, atol=2e-4)


class Watcher:
    """Changes no number, but returns a new tensor; keeps what it saw."""

    extra_calls = 0

    def __init__(self):
        self.corrected, self.observed = [], []

    def tries(self, step):
        return False

    def correct(self, step, eps):
        self.corrected.append((step, eps))
        return eps.clone()

    def observe(self, step, x_next, predict):
        self.observed.append((step, predict(step.x, torch.tensor(step.t))))

    def deductible_variance(self, step):
        return None


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@pytest.mark.parametrize(("name", "eta"), SAMPLERS)
def test_corrections_see_eps_and_change_no_bit_by_looking(name, eta, kind):
    watcher, used = Watcher(), []
    x = draw(name, kind, eta, watcher, on_step=lambda i, t, x, p: used.append((t, x, p)))
    assert torch.equal(x, draw(name, kind, eta))
    exact = gaussian(levels(scheduler_for(name, kind)), "epsilon")
    for (step, eps), (t, model_input, prediction) in zip(watcher.corrected, used, strict=True):
        expected = exact(model_input, t)
        assert torch.allclose(eps, expected, atol=1e-4)
        own = in_kind(expected, model_input, step.abar_t, kind)
        assert torch.allclose(prediction, own, atol=1e-3)  # on_step: what the model predicts
    for step, again in watcher.observed:
        assert torch.equal(again, step.eps)
        x0 = (step.x - math.sqrt(1 - step.abar_t) * step.eps) / math.sqrt(step.abar_t)
        assert torch.allclose(step.x0, x0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "eta", "kind"),
    [
        (name, eta, kind)
        for name, eta in [*SAMPLERS, ("plms", 0.0)]
        for kind in PARAMETRIZATIONS
        if (name, kind) != ("plms", "sample")
    ],
)
@pytest.mark.parametrize("method", [PtqdCorrection, AffineCorrection])
def test_statistics_of_an_unquantized_model_change_no_bit(method, name, eta, kind):
    correction = method(statistics(name, eta, lambda eps, _: eps))
    assert torch.equal(draw(name, kind, eta, correction), draw(name, kind, eta))


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmsolver++", "unipc"])
def test_the_total_estimate_of_a_point_mass_is_zero(name, kind):
    """s = 0: the denoiser names the whole noise exactly, so nothing is left to correct."""
    correction = RuntimeCorrection(generators_for(SEEDS, "correction"), interval=1)
    corrected = draw(name, kind, 0.0, correction, s=0.0)
    assert correction.extra_calls == STEPS - 1
    assert max(e.mean.abs().max() for e in correction.estimates) < 2e-3
    assert torch.allclose(corrected, draw(name, kind, s=0.0), atol=2e-3)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_zero_terminal_snr_is_refused_only_with_a_correction(kind):
    changed = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = make_scheduler("ddim", {**LDM, "prediction_type": kind, **changed})
    with pytest.raises(ConfigError, match="without any signal.*inter.method to none"):
        denoise(still, scheduler, STEPS, generators_for([0]), SHAPE, correction=Watcher())
    if kind != "epsilon":  # eps at abar = 0 divides by zero in DDIM itself
        x = denoise(still, scheduler, STEPS, generators_for([0]), SHAPE)
        assert torch.isfinite(x).all()


def still(x, t):
    return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "flow_prediction", "use_flow_sigmas": True}, "'flow_prediction'"),
        ({"prediction_type": "sample", "use_flow_sigmas": True}, "flow-matching sigmas"),
        ({"prediction_type": "score"}, "'score'"),
    ],
)
def test_other_paths_are_refused(config, message):
    scheduler = make_scheduler("dpmsolver++", {**LDM, **config})
    with pytest.raises(ConfigError, match=f"do not cover.*{message}.*inter.method to none"):
        denoise(still, scheduler, STEPS, generators_for([0]), SHAPE, correction=Watcher())


def test_pndm_refuses_x0_models_before_it_starts():
    for name in ("plms", "pndm"):
        with pytest.raises(ConfigError, match="PNDMScheduler cannot step.*'sample'"):
            draw(name, "sample")
