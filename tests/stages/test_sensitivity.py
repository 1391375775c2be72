"""The estimate of what a layer's rounding does, against measuring it; and what is made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch import Tensor, nn

from qncd_cli.artifacts import Artifact
from qncd_cli.config import Config, parse_config
from qncd_cli.models.loading import DiffusionModel, load_model
from qncd_cli.models.topology import count_macs
from qncd_cli.quant.affine import QParams, fake_quantize
from qncd_cli.quant.rounding import round_nearest
from qncd_cli.quant.smoothing import fold, smooth
from qncd_cli.spec import activation_spec, weight_spec
from qncd_cli.stages import calibrate
from qncd_cli.stages.assemble import full_denoiser, guided_predict, timestep_group
from qncd_cli.stages.choose_smoothing import Factors, factors_of
from qncd_cli.stages.plan import LayerPlan, plan_layers
from qncd_cli.stages.quantize import input_qparams
from qncd_cli.stages.sensitivity import ROWS_PER_STEP, Sensitivity, refine, sensitivity

ACTIVATION_BITS = 6


@dataclass
class Calibrated:
    folder: Path
    model: DiffusionModel
    calibration: Artifact
    factors: Factors

    def config(self, **changes) -> Config:
        return config_of(self.folder, **changes)

    @property
    def plans(self) -> list[LayerPlan]:
        return plan_layers(self.config(), self.model.denoiser)

    def estimate(self) -> Sensitivity:
        return sensitivity(self.config(), self.model, self.calibration, self.plans, self.factors)

    def refined(self, **changes) -> list[LayerPlan]:
        config = self.config(**changes)
        return refine(config, self.model, self.calibration, self.plans, self.factors)

    def predictions(self) -> Tensor:
        """Guided predictions [n, values] at the first rows of every timestep."""
        rows = self.calibration.tensors
        parts = []
        for t in rows["inputs.timestep"].unique():
            at = (rows["inputs.timestep"] == t).nonzero().flatten()[:ROWS_PER_STEP]
            labels = rows["inputs.class"][at]
            scale = self.config().sampling.guidance_scale
            predict = guided_predict(self.model, full_denoiser(self.model), labels, scale)
            parts.append(predict(rows["inputs.x"][at], t))
        return torch.cat(parts).double().flatten(1)


def config_of(folder: Path, **changes) -> Config:
    common = {
        "quantization__activations__bits": ACTIVATION_BITS,
        "quantization__activations__timestep_groups": 2,
        "quantization__activations__observer": "minmax",
    }
    return parse_config(tiny_config(folder, **{**common, **changes}), "test")


@pytest.fixture(scope="module")
def calibrated(tiny_model) -> Calibrated:
    model = load_model(str(tiny_model))
    calibration, smoothing = calibrate.run(config_of(tiny_model), model)
    return Calibrated(tiny_model, model, calibration, factors_of(smoothing))


@pytest.fixture(scope="module")
def estimated(calibrated) -> Sensitivity:
    return calibrated.estimate()


# ---- the estimate -------------------------------------------------------------------------------


def relative_error(changed: Tensor, full: Tensor) -> float:
    """Mean over rows of the relative squared error."""
    return float(((changed - full).square().sum(1) / full.square().sum(1)).mean())


def with_rounded_weight(subject: Calibrated, plan: LayerPlan, full: Tensor) -> float:
    """The error with the layer's weight really rounded."""
    exact, factor = plan.layer.weight.data.clone(), subject.factors.get(plan.name)
    weight = exact if factor is None else fold(exact, factor.factor)
    codes, (scale, zero), _ = round_nearest(weight, weight_spec(plan.weight_bits))
    shape = [-1] + [1] * (weight.ndim - 1)
    rounded = (codes - zero.reshape(shape)) * scale.reshape(shape)
    plan.layer.weight.data = rounded if factor is None else fold(rounded, 1 / factor.factor)
    try:
        return relative_error(subject.predictions(), full)
    finally:
        plan.layer.weight.data = exact


def with_rounded_input(subject: Calibrated, plan: LayerPlan, full: Tensor) -> float:
    """The error with the layer's input, and no other tensor, really rounded."""
    qparams = input_qparams(plan, subject.calibration, subject.config(), None)
    assert qparams is not None
    factor, spec = subject.factors.get(plan.name), activation_spec(plan.activation_bits)
    bounds = tuple(subject.calibration.body["group_bounds"])
    now: list[float] = []

    def see(module: nn.Module, args: tuple) -> None:
        now.append(float(args[1].flatten()[0]))

    def rounded(module: nn.Module, args: tuple) -> Tensor:
        x, group = args[0], timestep_group(now[-1], bounds)
        at_group = QParams(qparams.scale[group], qparams.zero_point[group])
        if factor is None:
            return fake_quantize(x, at_group, spec)
        y = smooth(x, factor.factor, plan.channel_axis)
        return smooth(fake_quantize(y, at_group, spec), 1 / factor.factor, plan.channel_axis)

    handles = [
        subject.model.denoiser.register_forward_pre_hook(see),
        plan.layer.register_forward_pre_hook(rounded),
    ]
    try:
        return relative_error(subject.predictions(), full)
    finally:
        for handle in handles:
            handle.remove()


def rank_correlation(a: list[float], b: list[float]) -> float:
    ranks = torch.tensor([a, b]).argsort(1).argsort(1).float()
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("what", ["weights", "inputs"])
def test_the_estimate_is_the_measured_error(calibrated, estimated, what):
    measure = with_rounded_weight if what == "weights" else with_rounded_input
    full = calibrated.predictions()
    plans = [p for p in calibrated.plans if what == "weights" or p.activation_bits <= 8]
    measured = {p.name: measure(calibrated, p, full) for p in plans}
    found = {name: getattr(estimated, what)[name] for name in measured}
    for name in sorted(measured, key=lambda n: -measured[n])[:5]:
        assert abs(math.log(found[name] / measured[name])) < math.log(3), name
    counted = [n for n in measured if measured[n] > 1e-12]
    assert len(counted) > 20
    assert rank_correlation([found[n] for n in counted], [measured[n] for n in counted]) > 0.9


def test_layers_that_read_one_tensor_have_errors_of_their_own(calibrated, estimated):
    """q, k and v share their input; rounding it for one of them is not rounding it for all."""
    shared = [n for n in estimated.inputs if ".attn1.to_" in n and "to_out" not in n]
    assert len({estimated.inputs[n] for n in shared}) == len(shared) > 0


def test_the_estimate_is_repeatable_and_leaves_no_trace(calibrated, estimated):
    before = torch.get_rng_state()
    assert calibrated.estimate() == estimated
    assert torch.equal(before, torch.get_rng_state())
    fresh = load_model(str(calibrated.folder)).denoiser.state_dict()
    now = calibrated.model.denoiser
    assert all(torch.equal(now.state_dict()[k], v) for k, v in fresh.items())
    assert not any(p.requires_grad or p.grad is not None for p in now.parameters())
    assert not any(m._forward_pre_hooks for m in now.modules())


def test_an_error_leaves_no_trace_either(calibrated):
    denoiser = calibrated.model.denoiser

    def fail(module: nn.Module, args: tuple) -> None:
        assert denoiser.conv_in.weight.requires_grad
        raise KeyboardInterrupt

    handle = denoiser.mid_block.register_forward_pre_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            calibrated.estimate()
    finally:
        handle.remove()
    assert not any(p.requires_grad for p in denoiser.parameters())
    assert not any(m._forward_pre_hooks for m in denoiser.modules())


# ---- what is made of it -------------------------------------------------------------------------


def sensitive(weights_share: float, macs_share: float) -> dict:
    return {"quantization__sensitive": {"weights_share": weights_share, "macs_share": macs_share}}


def finer(calibrated: Calibrated, refined: list[LayerPlan]) -> set[str]:
    pairs = list(zip(calibrated.plans, refined, strict=True))
    assert all(a.name == b.name for a, b in pairs)
    assert all(b.weight_bits == 8 for a, b in pairs if b.weight_bits != a.weight_bits)
    return {a.name for a, b in pairs if b.weight_bits != a.weight_bits}


def wider(calibrated: Calibrated, refined: list[LayerPlan]) -> set[str]:
    pairs = list(zip(calibrated.plans, refined, strict=True))
    changed = {a.name: b for a, b in pairs if b.activation_bits != a.activation_bits}
    assert all((b.activation_bits, b.observer) == (16, "minmax") for b in changed.values())
    return set(changed)


def macs_of(calibrated: Calibrated) -> dict[str, int]:
    model = calibrated.model
    condition = model.condition(torch.tensor([0]))

    def call() -> Tensor:
        x = torch.zeros(1, *model.latent_shape)
        return full_denoiser(model)(x, torch.tensor(0), condition)

    return {cost.name: cost.macs for cost in count_macs(model.denoiser, call)}


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_shares_are_kept(calibrated, estimated, share):
    refined = calibrated.refined(**sensitive(share, share))
    sizes = {p.name: p.layer.weight.numel() for p in calibrated.plans}
    macs = macs_of(calibrated)
    for chosen, costs, errors, left_out in (
        (finer(calibrated, refined), sizes, estimated.weights, lambda p: p.weight_bits >= 8),
        (wider(calibrated, refined), macs, estimated.inputs, lambda p: p.activation_bits > 8),
    ):
        assert chosen
        used, limit = sum(costs[n] for n in chosen), share * sum(costs.values())
        assert used <= limit
        others = {p.name for p in calibrated.plans if not left_out(p)} - chosen
        assert all(costs[n] > limit - used for n in others if errors[n] > 0)  # no more fits
        density = {n: errors[n] / costs[n] for n in chosen | others}
        small = [n for n in others if costs[n] <= limit]
        best = max(density, key=lambda n: density[n] if costs[n] <= limit else -1)
        assert best in chosen
        if small:
            assert max(density[n] for n in chosen) >= max(density[n] for n in small)


def test_no_share_changes_nothing_and_calls_nothing(calibrated):
    def called(module: nn.Module, args: tuple) -> None:
        raise AssertionError("the model was called")

    handle = calibrated.model.denoiser.register_forward_pre_hook(called)
    try:
        refined = calibrated.refined(**sensitive(0.0, 0.0))
    finally:
        handle.remove()
    described = [(p.name, p.weight_bits, p.activation_bits, p.observer) for p in refined]
    before = [(p.name, p.weight_bits, p.activation_bits, p.observer) for p in calibrated.plans]
    assert described == before


def test_each_share_is_about_its_own_operand(calibrated):
    both = calibrated.refined(**sensitive(0.1, 0.2))
    weights = calibrated.refined(**sensitive(0.1, 0.0))
    inputs = calibrated.refined(**sensitive(0.0, 0.2))
    assert finer(calibrated, weights) == finer(calibrated, both)
    assert wider(calibrated, weights) == set()
    assert wider(calibrated, inputs) == wider(calibrated, both)
    assert finer(calibrated, inputs) == set()


def test_a_budget_decides_about_the_weights_by_itself(calibrated):
    refined = calibrated.refined(**sensitive(0.5, 0.2), quantization__weights__budget=4.5)
    assert finer(calibrated, refined) == set()
    assert wider(calibrated, refined)
