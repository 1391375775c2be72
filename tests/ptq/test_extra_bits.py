"""The estimate of what a layer's rounding does, against measuring it; and what is made of it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch import Tensor, nn

from qncd_cli.config.loading import load_config, parse_config
from qncd_cli.config.schema import Config
from qncd_cli.models.loading import DiffusionModel, load_model
from qncd_cli.models.topology import count_macs
from qncd_cli.ptq import sensitivity as sensitivities
from qncd_cli.ptq.extra_bits import refine, spend
from qncd_cli.ptq.job import QuantizationJob
from qncd_cli.ptq.layer_plan import LayerPlan, plan_layers
from qncd_cli.ptq.sensitivity import Sensitivity, sensitivity
from qncd_cli.ptq.smoothing_choice import Factors, factors_of
from qncd_cli.quant.affine import QParams, fake_quantize
from qncd_cli.quant.rounding import round_nearest
from qncd_cli.quant.smoothing import fold, smooth
from qncd_cli.runtime.denoiser import full_denoiser, guided_predict, timestep_group
from qncd_cli.spec import activation_spec, weight_spec
from qncd_cli.stages import calibrate, quantize
from qncd_cli.stages.quantize import input_qparams
from qncd_cli.store.artifacts import Artifact

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

    def job(self, **changes) -> QuantizationJob:
        config = self.config(**changes)
        return QuantizationJob(config, self.model, self.calibration, self.plans, self.factors)

    def estimate(self) -> Sensitivity:
        return sensitivity(self.job())

    def refined(self, **changes) -> list[LayerPlan]:
        return refine(self.job(**changes))[0]

    def predictions(self) -> Tensor:
        """Guided predictions [n, values] at the first rows of every timestep."""
        rows = self.calibration.tensors
        parts = []
        for t in rows["inputs.timestep"].unique():
            at = (rows["inputs.timestep"] == t).nonzero().flatten()[:4]
            labels = rows["inputs.class"][at]
            scale = self.config().sampling.guidance_scale
            predict = guided_predict(self.model, full_denoiser(self.model), labels, scale)
            parts.append(predict(rows["inputs.x"][at], t))
        return torch.cat(parts).double().flatten(1)


def config_of(folder: Path, **changes) -> Config:
    common = {
        "calibration__effort": "thorough",
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
    qparams = input_qparams(subject.job(), plan, None)
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


def test_large_models_take_rows_one_by_one_and_hold_no_errors(calibrated, estimated, monkeypatch):
    monkeypatch.setattr(sensitivities, "AT_ONCE", 1)
    monkeypatch.setattr(sensitivities, "HELD", 0)
    found = calibrated.estimate()
    for name, value in estimated.weights.items():
        assert found.weights[name] == pytest.approx(value, rel=1e-4, abs=1e-15), name
    for name, value in estimated.inputs.items():  # of 16 bits, codes follow the last bits of sums
        assert found.inputs[name] == pytest.approx(value, rel=0.1, abs=1e-15), name


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


def sensitive(weight_bits: float, activation_bits: float) -> dict:
    both = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    return {"quantization__sensitive": both}


def widened(calibrated: Calibrated, refined: list[LayerPlan], what: str) -> dict[str, int]:
    """New bits of the layers that have more of them than before."""
    pairs = list(zip(calibrated.plans, refined, strict=True))
    assert all(a.name == b.name for a, b in pairs)
    found = {a.name: (getattr(a, what), getattr(b, what)) for a, b in pairs}
    assert all(after >= before for before, after in found.values())
    return {name: after for name, (before, after) in found.items() if after > before}


def finer(calibrated: Calibrated, refined: list[LayerPlan]) -> dict[str, int]:
    found = widened(calibrated, refined, "weight_bits")
    assert set(found.values()) <= {6, 8, 15}
    return found


def wider(calibrated: Calibrated, refined: list[LayerPlan]) -> dict[str, int]:
    found = widened(calibrated, refined, "activation_bits")
    assert set(found.values()) <= {8, 16}
    before = {p.name: p.observer for p in calibrated.plans}
    for plan in refined:
        if plan.name in found:
            same = plan.activation_bits == 8
            assert plan.observer == (before[plan.name] if same else "minmax")
    return found


def macs_of(calibrated: Calibrated) -> dict[str, int]:
    model = calibrated.model
    condition = model.condition(torch.tensor([0]))

    def call() -> Tensor:
        x = torch.zeros(1, *model.latent_shape)
        return full_denoiser(model)(x, torch.tensor(0), condition)

    return {cost.name: cost.macs for cost in count_macs(model.denoiser, call)}


@pytest.mark.parametrize("extra", [0.1, 0.5, 1.5])
def test_extra_bits_are_kept_to_and_used_up(calibrated, estimated, extra):
    refined = calibrated.refined(**sensitive(extra, extra))
    sizes = {p.name: p.layer.weight.numel() for p in calibrated.plans}
    macs = macs_of(calibrated)
    for found, costs, errors, what, widths in (
        (finer(calibrated, refined), sizes, estimated.weights, "weight_bits", (4, 6, 8, 15)),
        (wider(calibrated, refined), macs, estimated.inputs, "activation_bits", (6, 8, 16)),
    ):
        before = {p.name: getattr(p, what) for p in calibrated.plans}
        assert found
        used = sum((bits - before[n]) * costs[n] for n, bits in found.items())
        left = extra * sum(costs.values()) - used
        assert left >= 0
        for name, bits in before.items():
            now = found.get(name, bits)
            larger = [w for w in widths if w > now]
            if larger and errors.get(name, 0) > 0:
                assert (larger[0] - now) * costs[name] > left, name  # no widening fits any more


def test_no_other_choice_of_bits_leaves_less_error():
    """Against all choices, on costs where nothing remains."""
    errors = {"a": 9.0, "b": 4.0, "c": 0.5, "d": 0.1}
    costs = dict.fromkeys(errors, 3)
    widths = (4, 6, 8)
    found = spend(errors, dict.fromkeys(errors, 4), costs, widths, 2.0)

    def left(bits: tuple[int, ...]) -> float:
        return sum(e * 4.0 ** (4 - b) for e, b in zip(errors.values(), bits, strict=True))

    choices = [c for c in itertools.product(widths, repeat=4) if sum(c) <= 24]
    assert left(tuple(found.values())) == min(left(c) for c in choices)
    assert found == {"a": 8, "b": 6, "c": 6, "d": 4}


def test_what_costs_nothing_or_errs_nothing_is_left_alone():
    bits = {"free": 6, "exact": 6, "top": 16, "other": 6}
    errors = {"free": 1.0, "exact": 0.0, "top": 1.0, "other": 1.0}
    costs = {"exact": 1, "top": 1, "other": 1}
    found = spend(errors, bits, costs, (4, 6, 8, 16), 100.0)
    assert found == {"free": 6, "exact": 6, "top": 16, "other": 16}


def test_no_extra_bits_change_nothing_and_call_nothing(calibrated):
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


def test_extra_bits_are_each_about_their_own_operand(calibrated):
    both = calibrated.refined(**sensitive(0.4, 1.0))
    weights = calibrated.refined(**sensitive(0.4, 0.0))
    inputs = calibrated.refined(**sensitive(0.0, 1.0))
    assert finer(calibrated, weights) == finer(calibrated, both)
    assert wider(calibrated, weights) == {}
    assert wider(calibrated, inputs) == wider(calibrated, both)
    assert finer(calibrated, inputs) == {}


def test_a_budget_decides_about_the_weights_by_itself(calibrated):
    refined = calibrated.refined(**sensitive(0.5, 1.0), quantization__weights__budget=4.5)
    assert finer(calibrated, refined) == {}
    assert wider(calibrated, refined)


@pytest.mark.slow
def test_labels_of_best_stand_for_more_bits_than_they_name():
    """The packaged model's means over MACs, as every table gives them beside the label. What is
    cheap here (ranges, rounding, trajectories) hardly moves which layers are sensitive."""
    cheap = ["quantization.weights.rounding=nearest", "quantization.activations.observer=minmax"]
    cheap += ["quantization.activations.timestep_groups=1", "calibration.trajectories=4"]
    cheap += ["calibration.noise_trajectories=1"]
    configs = {bits: load_config(f"fashion_ldm_{bits}", cheap) for bits in ("w8a8", "w4a8")}
    model = load_model(configs["w4a8"].model.source)
    calibrated = calibrate.run(configs["w4a8"], model)  # at any width
    means = {}
    for bits, config in configs.items():
        result = quantize.run(config, model, *calibrated)
        means[bits] = result.coverage["mean_weight_bits"], result.coverage["mean_input_bits"]
    assert means["w8a8"] == pytest.approx((10.6, 9.0), abs=0.4)
    assert means["w4a8"] == pytest.approx((6.0, 9.0), abs=0.4)
