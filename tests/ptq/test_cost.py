"""What parts say that they cost against what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from torch import nn

from qncd_cli.config.effort import EFFORTS
from qncd_cli.config.loading import parse_config
from qncd_cli.config.schema import Config
from qncd_cli.forecast import activations, artifacts
from qncd_cli.forecast.shapes import model_shapes
from qncd_cli.models.loading import DiffusionModel, load_model
from qncd_cli.models.topology import count_macs
from qncd_cli.progress import no_progress
from qncd_cli.ptq import (
    bit_budget,
    calibration_probes,
    hessians,
    layer,
    probes,
    sensitivity,
    step_weights,
)
from qncd_cli.ptq.cost import DenoiserCall
from qncd_cli.ptq.job import QuantizationJob
from qncd_cli.ptq.layer_plan import plan_layers
from qncd_cli.runtime import trajectory
from qncd_cli.runtime.denoiser import full_denoiser
from qncd_cli.stages import calibrate, quantize

FEW = {"trajectories": 3, "batch_size": 2, "noise_trajectories": 2}


@contextmanager
def rows_of_calls(model: DiffusionModel) -> Iterator[list[int]]:
    """Rows of every call of the model's denoiser within the block."""
    found: list[int] = []

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(len(args[0] if args else kwargs["sample"]))

    handle = model.denoiser.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def call_of(config: Config, model: DiffusionModel) -> DenoiserCall:
    """The denoiser's sizes as a forecast knows them: from shapes alone."""
    times = trajectory.timesteps(config, model)
    shapes = model_shapes(config.model.source, torch.float32)
    calibration = artifacts.calibration(config, shapes, times)
    smoothing = artifacts.smoothing(config, shapes)
    quantized = artifacts.quantized(config, shapes, calibration, smoothing)
    with torch.no_grad():
        macs = count_macs(shapes.denoiser, lambda: shapes.call(1))
    return activations.meter(config, shapes, quantized, macs, len(times))


@pytest.mark.parametrize(
    ("intra", "guidance"), [("none", 1.0), ("embedding", 2.0), ("range", 2.0), ("auto", 2.0)]
)
def test_calibration_calls_the_denoiser_as_often_as_it_says(tiny_model, intra, guidance):
    tree = tiny_config(tiny_model, calibration=FEW, correction__intra=intra)
    tree["sampling"] = {"steps": 3, "guidance_scale": guidance}
    config = parse_config(tree, "test")
    model = load_model(config.model.source)
    call = call_of(config, model)
    with rows_of_calls(model) as rows:
        calibrate.run(config, model)
    costs = calibrate.costs(config, model.denoiser, model.num_classes, call)
    assert sum(cost.model_macs for cost in costs.values()) == sum(rows) * call.macs


def test_probes_hold_as_many_bytes_as_they_say(tiny_model):
    config = parse_config(tiny_config(tiny_model, calibration={**FEW, "trajectories": 6}), "test")
    model = load_model(config.model.source)
    plans, steps = plan_layers(config, model.denoiser), config.sampling.steps
    found = probes.collect_probes(config, model, full_denoiser(model), plans, steps, no_progress)
    held = sum(x.nbytes for probe in found.values() for _, x in probe.parts)
    assert probes.cost(config, plans, call_of(config, model)).kept == held > 0


@pytest.mark.parametrize("positions", [4, 1024])
@pytest.mark.parametrize("elements", [1 << 19, 4])
def test_probes_on_calibration_hold_as_many_bytes_as_they_say(
    tiny_model, monkeypatch, elements, positions
):
    """elements: with few of them the model counts as large: a step shows one trajectory."""
    tree = tiny_config(tiny_model, calibration={**FEW, "trajectories": 6})
    config = parse_config(tree | {"sampling": {"steps": 3, "guidance_scale": 2.0}}, "test")
    name = config.calibration.effort
    monkeypatch.setitem(EFFORTS, name, replace(EFFORTS[name], probe_elements=elements))
    monkeypatch.setattr(calibration_probes, "POSITIONS", positions)
    model = load_model(config.model.source)
    calibration, _ = calibrate.run(config, model)
    plans = plan_layers(config, model.denoiser)
    with rows_of_calls(model) as rows:
        found = calibration_probes.probes_on_calibration(
            QuantizationJob(config, model, calibration, plans, {}), plans
        )
    cost = calibration_probes.cost(config, plans, call_of(config, model))
    held = sum(x.nbytes for probe in found.values() for _, x in probe.parts)
    assert 0 < held <= cost.kept <= 1.2 * held
    assert sum(rows) * call_of(config, model).macs == cost.model_macs
    assert rows[-1] == (2 if elements == 4 else 12)
    for plan in plans:
        for t, part in found[plan.name].parts:
            assert part[0].numel() <= positions * plan.in_channels, t


def test_hessians_and_sensitivity_take_as_many_rows_as_they_say(tiny_model):
    sensitive = {"weight_bits": 0.5, "activation_bits": 0.5}
    tree = tiny_config(
        tiny_model, calibration={**FEW, "trajectories": 4}, quantization__sensitive=sensitive
    )
    config = parse_config(tree, "test")
    model = load_model(config.model.source)
    call = call_of(config, model)
    calibration, _ = calibrate.run(config, model)
    plans = plan_layers(config, model.denoiser)
    job = QuantizationJob(config, model, calibration, plans, {})
    looks = config.calibration.looks
    with rows_of_calls(model) as rows:
        hessians.collect_hessians(job, dict.fromkeys((p.name for p in plans), None))
    found = hessians.cost(config, plans, call)
    assert found.model_macs == sum(rows) * call.macs
    assert 0 < found.macs <= sum(hessians.wanted_rows(p, looks) * p.in_features**2 for p in plans)
    with rows_of_calls(model) as rows:
        sensitivity.sensitivity(job)
    backward = 1 + sensitivity.BACKWARD * looks.sensitivity_projections
    passes = rows[0] + sum(rows[1:]) * backward
    assert sensitivity.cost(plans, call, looks).model_macs == passes * call.macs
    with rows_of_calls(model) as rows:
        step_weights.step_weights(config, model, calibration)
    backward = 1 + step_weights.BACKWARD * step_weights.DIRECTIONS
    assert step_weights.cost(config, call).model_macs == sum(rows) * call.macs * backward


def test_the_parts_of_quantization_follow_the_configuration(tiny_model):
    def parts(**changes) -> list[str]:
        config = parse_config(tiny_config(tiny_model, **changes), "test")
        model = load_model(config.model.source)
        return list(quantize.costs(config, model.denoiser, DenoiserCall(2, 4, 1, 1, 1, 1, 1, 1)))

    least = ["rounding weights", "measuring noise"]
    nearest = {"bits": 4, "rounding": "nearest"}
    assert parts(quantization__weights=nearest) == least
    gptq = [least[0], "Hessians", "GPTQ of the widest layers", least[1]]
    assert parts() == gptq
    assert parts(quantization__step_weights=1.0) == ["weighing steps", *gptq]
    learnt = parts(
        quantization__weights={"bits": 4, "rounding": "brecq", "budget": 4.5},
        quantization__bias_correction=True,
    )
    assert learnt == [
        "assigning bits",
        "activation ranges",
        *gptq[:-1],
        "learning the rounding",
        gptq[-1],
    ]


def test_what_grows_faster_than_the_weights(tiny_model):
    """GPTQ's matrices with the square of the inputs, a budget's calls with the layers."""
    config = parse_config(tiny_config(tiny_model), "test")
    plans = plan_layers(config, load_model(config.model.source).denoiser)
    widest = max(plans, key=lambda p: p.in_features)
    alone = layer.gptq_cost([widest])
    assert alone.bytes == pytest.approx((1 + layer.GPTQ_MATRICES) * 4 * widest.in_features**2)
    call = DenoiserCall(1, 4, 1, 1, 1, 1, 1, macs=100)
    tried = len(plans) * len(bit_budget.WIDTHS) * bit_budget.TRIED_ROWS
    assert bit_budget.cost(plans, call).model_macs == 100 * tried
