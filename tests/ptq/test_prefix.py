"""Rounding along the network: what later layers see, and what comes of it."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_config

from qncd_cli.config.loading import parse_config
from qncd_cli.errors import ConfigError
from qncd_cli.models.loading import load_model
from qncd_cli.models.topology import capture_inputs, weight_layers
from qncd_cli.progress import no_progress
from qncd_cli.ptq.hessians import collect_hessians, hessian_batches, with_hessians
from qncd_cli.ptq.job import QuantizationJob
from qncd_cli.ptq.layer import quantize_layer
from qncd_cli.ptq.layer_plan import plan_layers
from qncd_cli.ptq.prefix import TwofoldDenoiser, before, passes_of
from qncd_cli.quant.layers import QuantizedLayer, StepState
from qncd_cli.quant.smoothing import IDENTITY
from qncd_cli.runtime.denoiser import full_denoiser, guided_predict
from qncd_cli.stages import calibrate, quantize
from qncd_cli.store.partial import Piece


@pytest.fixture(scope="module")
def job(tiny_model):
    weights = {"bits": 3, "rounding": "gptq", "passes": 4, "asymmetry": 0.5}
    tree = tiny_config(tiny_model, quantization__weights=weights, correction__intra="none")
    config = parse_config(tree, "test")
    model = load_model(config.model.source)
    calibration, _ = calibrate.run(config, model)
    return QuantizationJob(config, model, calibration, plan_layers(config, model.denoiser), {})


def one_by_one(groups):
    return ((plan, held.pop(plan.name)) for plans, held in groups for plan in plans)


@pytest.fixture(scope="module")
def rounded(job):
    """Every layer's tensors, rounded in passes, and the names in the order in which they came."""
    found: dict[str, Piece] = {}
    qparams = dict.fromkeys((plan.name for plan in job.plans), None)
    for plan, curvature in one_by_one(with_hessians(job, qparams, found, no_progress)):
        tensors, entry = quantize_layer(plan, None, IDENTITY, curvature, 0.5)
        found[plan.name] = Piece(entry.to_body(), tensors)
    return found


def first_call(job, denoiser):
    t, picked = hessian_batches(job.calibration, 3, 20)[0]
    inputs = job.calibration.tensors
    predict = guided_predict(job.model, denoiser, inputs["inputs.class"][picked], 2.0)
    return predict(inputs["inputs.x"][picked], torch.tensor(t))


def inputs_of(job, denoiser):
    """What every layer of a denoiser gets in that call."""
    found = {}
    with capture_inputs(denoiser.module, [p.name for p in job.plans], found.setdefault):
        first_call(job, denoiser)
    return found


def test_passes_follow_the_call_and_hold_every_layer_once(job):
    groups = passes_of(job, 4)
    names = [plan.name for group in groups for plan in group]
    assert len(groups) == 4
    assert sorted(names) == sorted(plan.name for plan in job.plans)
    middle = next(n for n in names if n.startswith("mid_block"))
    first_up = next(n for n in names if n.startswith("up_blocks"))
    assert names.index(middle) < names.index(first_up)
    assert before(groups, 0) == []
    assert before(groups, 4) == names


def test_layers_behind_the_prefix_get_what_its_rounded_weights_make(job, rounded):
    groups = passes_of(job, 4)
    prefix = before(groups, 2)
    twofold = TwofoldDenoiser(job, {name: rounded[name].tensors for name in prefix})
    seen = inputs_of(job, twofold)

    module = copy.deepcopy(job.model.denoiser)
    layers, plans = weight_layers(module), {plan.name: plan for plan in job.plans}
    for name in prefix:
        tensors, bits = rounded[name].tensors, plans[name].weight_bits
        layer = QuantizedLayer(plans[name].layer, tensors, bits, 32, StepState(), None)
        layers[name].weight.data = layer.float_weight()
    whole = full_denoiser(job.model)
    alone = full_denoiser(type(job.model)(**{**vars(job.model), "denoiser": module}))
    full, behind = inputs_of(job, whole), inputs_of(job, alone)
    name = groups[2][0].name
    halves = seen[name].chunk(2)
    assert torch.allclose(halves[0], full[name], atol=1e-5)
    assert torch.allclose(halves[1], behind[name], atol=1e-4)
    assert not torch.allclose(halves[0], halves[1], atol=1e-3)


def test_a_twofold_call_predicts_as_full_precision_does(job, rounded):
    everything = {name: piece.tensors for name, piece in rounded.items()}
    twofold = first_call(job, TwofoldDenoiser(job, everything))
    assert torch.allclose(twofold, first_call(job, full_denoiser(job.model)), atol=1e-5)


def test_the_first_layer_has_not_drifted(job):
    first = passes_of(job, 4)[0][:1]
    unquantized = {first[0].name: None}
    found = collect_hessians(job.planned(first), unquantized, no_progress, TwofoldDenoiser(job, {}))
    assert not found[first[0].name].drift.any()


def test_what_is_rounded_already_is_not_asked_for_again(job, rounded):
    """A killed stage goes on with the same inputs: those of earlier passes, not of its own."""
    names = [plan.name for group in passes_of(job, 4) for plan in group]
    qparams = dict.fromkeys(names, None)
    kept = {name: rounded[name] for name in names[: len(names) // 2 + 1]}
    asked = []
    for plan, curvature in one_by_one(with_hessians(job, qparams, kept, no_progress)):
        asked.append(plan.name)
        tensors, entry = quantize_layer(plan, None, IDENTITY, curvature, 0.5)
        kept[plan.name] = Piece(entry.to_body(), tensors)
    assert asked == names[len(names) // 2 + 1 :]
    for name, piece in rounded.items():
        assert all(torch.equal(piece.tensors[k], kept[name].tensors[k]) for k in piece.tensors)


def test_the_stage_rounds_otherwise_than_in_one_pass(job):
    _, smoothing = calibrate.run(job.config, job.model)
    found = quantize.run(job.config, job.model, job.calibration, smoothing).quantized
    tree = job.config.to_dict()
    tree["quantization"]["weights"] |= {"passes": 1, "asymmetry": 0.0}
    plain = parse_config(tree, "test")
    other = quantize.run(plain, job.model, job.calibration, smoothing).quantized
    first, last = "conv_in.weight", "conv_out.weight"
    assert torch.equal(found.tensors[first], other.tensors[first])
    assert not torch.equal(found.tensors[last], other.tensors[last])


@pytest.mark.parametrize(
    "weights", [{"rounding": "nearest", "passes": 2}, {"rounding": "brecq", "asymmetry": 0.5}]
)
def test_passes_and_asymmetry_are_refused_where_nobody_would_use_them(weights, tiny_model):
    tree = tiny_config(tiny_model, quantization__weights={"bits": 4, **weights})
    with pytest.raises(ConfigError, match="gptq"):
        parse_config(tree, "test")
