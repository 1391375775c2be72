"""Step weights against really disturbed trajectories, and what they do to Hessians, ranges and
sensitivity."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import tiny_config

from qncd_cli.config.loading import parse_config
from qncd_cli.correction.offline import OfflineCorrection
from qncd_cli.models.loading import load_model
from qncd_cli.ptq.hessians import collect_hessians
from qncd_cli.ptq.job import QuantizationJob
from qncd_cli.ptq.layer_plan import LayerPlan, plan_layers
from qncd_cli.ptq.output_ranges import LayerOutput
from qncd_cli.ptq.probes import Probe
from qncd_cli.ptq.sensitivity import sensitivity
from qncd_cli.ptq.step_weights import found_step_weights, step_weights
from qncd_cli.quant.observers import RangeObserver
from qncd_cli.quant.smoothing import IDENTITY
from qncd_cli.runtime import trajectory
from qncd_cli.runtime.denoiser import full_denoiser
from qncd_cli.sampling.levels import plan_steps
from qncd_cli.sampling.noise import generator_for
from qncd_cli.stages import calibrate, quantize

SMALL = 1e-3
DRAWS = 12


class Disturbed(OfflineCorrection):
    """Adds a little white noise to eps at one step."""

    def __init__(self, index: int, draw: int):
        self.index, self.draw = index, draw

    def correct(self, step, prediction):
        if step.index != self.index:
            return prediction
        noise = torch.randn(prediction.shape, generator=generator_for(self.draw))
        return prediction + SMALL * noise


def config_of(folder, **changes):
    return parse_config(tiny_config(folder, correction__intra="none", **changes), "test")


@pytest.fixture(scope="module")
def calibrated(tiny_model):
    model = load_model(str(tiny_model))
    return model, calibrate.run(config_of(tiny_model), model)[0]


@pytest.fixture(scope="module")
def job(tiny_model, calibrated):
    model, calibration = calibrated
    plans = plan_layers(config_of(tiny_model), model.denoiser)
    return QuantizationJob(config_of(tiny_model), model, calibration, plans, {})


@pytest.mark.parametrize(
    ("scheduler", "kind"), [("ddim", "epsilon"), ("euler", "epsilon"), ("ddim", "v_prediction")]
)
def test_a_weight_is_what_an_error_of_the_step_does_to_the_end(tiny_model, scheduler, kind):
    model = load_model(str(tiny_model))
    predicts = {**model.scheduler_config, "prediction_type": kind}
    model = dataclasses.replace(model, scheduler_config=predicts)
    config = config_of(tiny_model, sampling__scheduler=scheduler)
    calibration, _ = calibrate.run(config, model)
    found = list(reversed(step_weights(config, model, calibration).values()))
    seeds, denoiser = list(range(4)), full_denoiser(model)
    end = trajectory.draw(config, model, denoiser, seeds)
    moved = []
    for step in plan_steps(trajectory.timed_scheduler(config, model), 0.0):
        changes = [
            trajectory.draw(config, model, denoiser, seeds, correction=Disturbed(step.index, i))
            for i in range(DRAWS)
        ]
        error = float((torch.stack(changes) - end).double().square().mean())
        # the disturbance is of eps, the weight of what the model predicts
        moved.append(error * (step.abar_t if kind == "v_prediction" else 1.0))
    measured = [m * len(moved) / sum(moved) for m in moved]
    for weight, true in zip(found, measured, strict=True):
        assert abs(math.log(weight / true)) < math.log(1.5), (found, measured)


def test_the_key_is_a_power_and_without_it_all_steps_count_alike(tiny_model, calibrated):
    assert found_step_weights(config_of(tiny_model), *calibrated) == {}
    full, half = (
        found_step_weights(config_of(tiny_model, quantization__step_weights=power), *calibrated)
        for power in (1.0, 0.5)
    )
    assert sum(full.values()) == pytest.approx(len(full))
    ratio = [half[t] / math.sqrt(full[t]) for t in full]
    assert max(ratio) == pytest.approx(min(ratio))


def test_hessians_and_sensitivity_are_sums_over_steps_by_weight(job):
    times = [int(t) for t in job.calibration.tensors["inputs.timestep"].unique()]
    first = {t: 2.0 if t == times[0] else 0.0 for t in times}
    others = {t: 0.0 if t == times[0] else 0.5 for t in times}
    both = {t: first[t] + others[t] for t in times}
    weighed = [dataclasses.replace(job, step_weights=w) for w in (first, others, both)]
    ranges = dict.fromkeys((p.name for p in job.plans), None)
    one, rest, total = ([c.hessian for c in collect_hessians(j, ranges).values()] for j in weighed)
    for a, b, c in zip(one, rest, total, strict=True):
        assert torch.allclose(a + b, c, rtol=1e-4, atol=1e-6 * float(c.abs().max()))
    one, rest, total = (sensitivity(j) for j in weighed)
    for name, error in total.weights.items():
        assert one.weights[name] + rest.weights[name] == pytest.approx(error, rel=1e-4, abs=1e-12)
    assert any(one.weights[name] > 0 for name in one.weights)


def test_a_step_without_weight_does_not_choose_its_groups_range():
    torch.manual_seed(0)
    plan = LayerPlan("layer", torch.nn.Linear(6, 5), 4, 4, "output")
    narrow = torch.randn(8, 20, 6)
    wide = 5 * torch.randn(8, 20, 6)
    observer = RangeObserver(6, -1, 1)
    for x in (narrow, wide):
        observer.update(x, 0)

    def ranges(parts, weights):
        probe = Probe(-1, parts)
        output = LayerOutput(plan, probe, IDENTITY, (), weights.__getitem__)
        return torch.stack(output.ranges(observer.state(), 99.99))

    alone = ranges([(1.0, narrow)], {1.0: 1.0})
    assert torch.equal(ranges([(1.0, narrow), (2.0, wide)], {1.0: 3.0, 2.0: 0.0}), alone)
    assert not torch.equal(ranges([(1.0, narrow), (2.0, wide)], {1.0: 1.0, 2.0: 1.0}), alone)


def test_quantization_takes_the_weights_that_are_asked_for(tiny_model, calibrated):
    model, calibration = calibrated
    config = config_of(tiny_model, quantization__step_weights=1.0)
    smoothing = calibrate.run(config, model)[1]
    plain = quantize.run(config_of(tiny_model), model, calibration, smoothing).quantized
    weighed = quantize.run(config, model, calibration, smoothing).quantized
    names = [name for name in plain.tensors if name.endswith(".weight")]
    assert any(not torch.equal(plain.tensors[name], weighed.tensors[name]) for name in names)
