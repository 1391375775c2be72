"""Reuse: terms that bring kept values back, and the artifact of a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from diffusers_pipelines import save

from qncd_cli.config.loading import parse_config
from qncd_cli.errors import ModelError
from qncd_cli.models.loading import load_model
from qncd_cli.models.text import Prompts
from qncd_cli.progress import no_progress
from qncd_cli.ptq.reuse import find_reuse, fit_site
from qncd_cli.ptq.reuse_errors import site_errors
from qncd_cli.runtime import trajectory
from qncd_cli.runtime.denoiser import quantized_denoiser
from qncd_cli.runtime.reuse import History, Pattern, ReusingDenoiser, reusing_denoiser, sites_of
from qncd_cli.stages import calibrate, quantize
from qncd_cli.store import artifacts

STEPS = 6
SEEDS = [0, 1, 2]


def history_of(*values) -> History:
    return History(list(values))


@pytest.mark.parametrize(("shape", "axis"), [((8, 3, 4, 4), 1), ((8, 16, 3), 2)])
def test_what_changes_evenly_is_foretold(shape, axis):
    generator = torch.Generator().manual_seed(0)
    start, change = torch.randn(2, *shape, generator=generator)
    history = history_of(start + change, start)
    wanted = start + 2 * change
    terms = fit_site(wanted, history, axis, 2)
    left = (history.estimate(terms, axis) - wanted).square().mean()
    assert left < 1e-4 * change.square().mean()
    assert terms.factor.shape == terms.slope.shape == terms.offset.shape == (2, 3)


def test_a_value_that_is_kept_exactly_has_terms_of_zeros():
    value = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    terms = fit_site(value, history_of(value, 0.5 * value), 1, 2)
    assert not any(part.any() for part in terms.parts())


def made_of(model, tree):
    config = parse_config(tree, "test")
    calibration, smoothing = (artifacts.seal(a) for a in calibrate.run(config, model))
    result = quantize.run(config, model, calibration, smoothing)
    return config, model, calibration, artifacts.seal(result.quantized)


def small(source, **changes):
    sampling = {"steps": STEPS, "guidance_scale": 2.0, "reuse": 0.6}
    return tiny_config(
        source,
        sampling={**sampling, **changes.pop("sampling", {})},
        calibration={"trajectories": 4, "batch_size": 4, "noise_trajectories": 4},
        quantization__weights={"bits": 8, "rounding": "nearest"},
        quantization__activations__observer="minmax",
        correction={"intra": "none", **changes},
    )


@pytest.fixture(scope="module", params=["tiny_model", "tiny_dit_model"])
def made(request):
    model = load_model(str(request.getfixturevalue(request.param)))
    return made_of(model, small(model.source))


def ends(config, model, denoiser):
    return trajectory.draw(config, model, denoiser, SEEDS)


def test_a_plan_keeps_to_its_budget_and_its_terms_bring_images_nearer(made):
    config, model, calibration, quantized = made
    plan = artifacts.seal(find_reuse(config, model, calibration, quantized, no_progress))
    assert plan.body["share"] <= 0.6 and len(plan.body["kept"]) == STEPS
    assert plan.body["kept"][0] == [] and any(plan.body["kept"])
    assert plan.parents == {"quantized": quantized.digest}

    def quantized_model():
        return quantized_denoiser(model, quantized, "simulate", True)

    wanted = ends(config, model, quantized_model())
    mended = reusing_denoiser(quantized_model(), plan)
    bare = ReusingDenoiser(quantized_model(), mended.pattern)
    left = [(ends(config, model, d) - wanted).square().mean() for d in (mended, bare)]
    assert 0 < left[0] < 0.8 * left[1]


def test_the_same_plan_comes_from_the_same_model(made):
    config, model, calibration, quantized = made
    first, second = (
        artifacts.seal(find_reuse(config, model, calibration, quantized, no_progress))
        for _ in range(2)
    )
    assert first.digest == second.digest


def test_an_error_is_that_of_the_prediction_with_the_value_of_that_age(made):
    config, model, _, quantized = made
    one = config.model_copy(
        update={
            "calibration": config.calibration.model_copy(
                update={"noise_trajectories": 2, "trajectories": 2}
            )
        }
    )
    errors = site_errors(
        one, model, quantized_denoiser(model, quantized, "simulate", True), no_progress
    )
    seeds = [config.calibration.seed + i for i in range(2)]
    site = min(sites_of(model.denoiser))
    times = tuple(trajectory.timesteps(config, model))
    found = []
    for kept in (frozenset[str](), frozenset({site})):
        denoiser = ReusingDenoiser(
            quantized_denoiser(model, quantized, "simulate", True),
            Pattern(times, (frozenset(), kept, *[frozenset()] * (STEPS - 2))),
        )
        passed = []
        trajectory.draw(
            config, model, denoiser, seeds, on_step=lambda i, t, x, p, to=passed: to.append(p)
        )
        found.append(passed[1])
    own = (found[0] - found[1]).square().mean()
    if model.scheduler_config["prediction_type"] == "v_prediction":  # eps = sigma x + alpha v
        timed = trajectory.timed_scheduler(config, model)
        own = own * timed.alphas_cumprod[int(times[1])]
    assert errors[site][1, 1] == pytest.approx(float(own), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "mends"),
    [("dpmsolver++", "both"), ("dpmsolver++", "none"), ("euler", "site"), ("euler", "output")],
)
def test_other_samplers_and_everything_that_can_be_mended(name, mends, tiny_model):
    model = load_model(str(tiny_model))
    tree = small(model.source, sampling={"scheduler": name}, reuse=mends)
    config, model, calibration, quantized = made_of(model, tree)
    plan = artifacts.seal(find_reuse(config, model, calibration, quantized, no_progress))
    assert bool(plan.body["sites"]) == (mends in ("site", "both"))
    assert bool(plan.body["channels"]) == (mends in ("output", "both"))
    denoiser = reusing_denoiser(quantized_denoiser(model, quantized, "simulate", True), plan)
    assert ends(config, model, denoiser).isfinite().all()


def test_a_rectified_flow_with_joint_attention(tmp_path):
    save("StableDiffusion3Pipeline", tmp_path)
    prompts = ("a red shoe", "a blue bag")
    model = load_model(str(tmp_path), prompts=Prompts(prompts, "", image_size=16))
    sampling = {"scheduler": "flow-euler", "prompts": [*prompts], "image_size": 16}
    made = made_of(model, small(model.source, sampling=sampling))
    config, model, calibration, quantized = made
    plan = artifacts.seal(find_reuse(config, model, calibration, quantized, no_progress))
    denoiser = reusing_denoiser(quantized_denoiser(model, quantized, "simulate", True), plan)
    wanted = ends(config, model, quantized_denoiser(model, quantized, "simulate", True))
    found = ends(config, model, denoiser)
    assert 0 < (found - wanted).square().mean() < 0.1 * wanted.square().mean()


def test_a_denoiser_without_sites_is_refused(tiny_model, monkeypatch):
    model = load_model(str(tiny_model))
    monkeypatch.setattr("qncd_cli.ptq.reuse.reuse_chains", lambda denoiser: [])
    config = parse_config(small(model.source), "test")
    with pytest.raises(ModelError, match="nothing of its denoiser can be reused"):
        find_reuse(config, replace(model), None, None, no_progress)
