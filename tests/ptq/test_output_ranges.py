"""Ranges and bias corrections judged by a layer's output, on single layers and the tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch import Tensor, nn
from torch.nn import functional as F

from qncd_cli.backends import int8
from qncd_cli.config.loading import parse_config
from qncd_cli.config.schema import Config
from qncd_cli.models.loading import load_model
from qncd_cli.ptq.job import QuantizationJob
from qncd_cli.ptq.layer_plan import LayerPlan
from qncd_cli.ptq.output_ranges import CLIP_WEIGHT, FRACTIONS, LayerOutput
from qncd_cli.ptq.probes import Probe
from qncd_cli.quant.affine import QParams, choose_qparams, fake_quantize
from qncd_cli.quant.layers import QuantizedLayer
from qncd_cli.quant.observers import RangeObserver, choose_range
from qncd_cli.quant.rounding import round_nearest
from qncd_cli.quant.smoothing import IDENTITY, SmoothingFactor, fold, smooth
from qncd_cli.runtime.denoiser import quantized_denoiser
from qncd_cli.spec import activation_spec, weight_spec
from qncd_cli.stages import calibrate, quantize
from qncd_cli.stages.quantize import MARGIN, input_qparams
from qncd_cli.store import artifacts
from qncd_cli.store.artifacts import Artifact

BOUNDS = (20.0, 10.0)
TIMES = {0: 25.0, 1: 15.0, 2: 5.0}
"""A timestep in each of the three groups."""


def make_layer(kind: str) -> nn.Conv2d | nn.Linear:
    torch.manual_seed(1)
    return nn.Conv2d(6, 5, 3, padding=1) if kind == "conv" else nn.Linear(6, 5)


def plan_of(kind: str, bits: int = 4) -> LayerPlan:
    return LayerPlan("layer", make_layer(kind), 4, bits, "output")


def inputs_of(kind: str, group: int) -> Tensor:
    """Long upper tails, wider from group to group."""
    generator = torch.Generator().manual_seed(group)
    shape = (4, 6, 5, 5) if kind == "conv" else (4, 25, 6)
    x = torch.randn(shape, generator=generator)
    return (1 + group) * (x + 0.2 * x.clamp(min=0) ** 3)


def output_of(
    plan: LayerPlan, inputs: dict[int, Tensor], factor: SmoothingFactor = IDENTITY
) -> LayerOutput:
    probe = Probe(plan.channel_axis, [(TIMES[group], x) for group, x in inputs.items()])
    return LayerOutput(plan, probe, factor, BOUNDS)


def state_of(plan: LayerPlan, inputs: dict[int, Tensor]) -> dict[str, Tensor]:
    observer = RangeObserver(6, plan.channel_axis, len(BOUNDS) + 1)
    for group, x in inputs.items():
        observer.update(x, group)
    return observer.state()


def objective(plan: LayerPlan, x: Tensor, low: Tensor, high: Tensor) -> float:
    """Squared error of the output from rounding, and CLIP_WEIGHT times that from clipping."""
    spec = activation_spec(plan.activation_bits)
    scale, zero = qparams = choose_qparams(low, high, spec)
    inside = torch.minimum(torch.maximum(x, -zero * scale), (spec.qmax - zero) * scale)
    weight = plan.layer.weight.detach()
    rounding = plan.apply(fake_quantize(x, qparams, spec) - inside, weight).double()
    clipping = plan.apply(inside - x, weight).double()
    return float(rounding.square().sum() + CLIP_WEIGHT * clipping.square().sum())


# ---- ranges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_no_range_is_worse_than_min_max_or_least_squares(kind, bits):
    plan = plan_of(kind, bits)
    inputs = {group: inputs_of(kind, group) for group in TIMES}
    state = state_of(plan, inputs)
    low, high = output_of(plan, inputs).ranges(state, 99.99)
    for name in ("minmax", "mse"):
        other_low, other_high = choose_range(state, name, activation_spec(bits))
        for group, x in inputs.items():
            found = objective(plan, x, low[group], high[group])
            other = objective(plan, x, other_low[group], other_high[group])
            assert found <= other * (1 + 1e-5), (name, group)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("tail", [0.0, 0.2, 2.0])
def test_the_range_is_that_of_a_search_through_all_candidates(kind, bits, tail):
    plan, generator = plan_of(kind, bits), torch.Generator().manual_seed(7)
    x = torch.randn((4, 6, 9, 9) if kind == "conv" else (4, 81, 6), generator=generator)
    x += tail * x**3 * torch.rand(x.shape, generator=generator)
    state, spec = state_of(plan, {0: x}), activation_spec(bits)
    low, high = (end[0] for end in choose_range(state, "minmax", spec))
    ends = [(low * a, high * b) for a in FRACTIONS for b in FRACTIONS]
    tight = choose_range(state, "mse", spec, 99.99)
    least = min(objective(plan, x, *pair) for pair in [*ends, (tight[0][0], tight[1][0])])
    found = output_of(plan, {0: x}).ranges(state, 99.99)
    assert objective(plan, x, found[0][0], found[1][0]) <= least * 1.02


def test_a_group_that_the_probe_does_not_hold_takes_min_max():
    plan = plan_of("linear")
    inputs = {group: inputs_of("linear", group) for group in TIMES}
    state = state_of(plan, inputs)
    low, high = output_of(plan, {0: inputs[0]}).ranges(state, 99.99)
    assert torch.equal(low[1:], state["min"][1:]) and torch.equal(high[1:], state["max"][1:])
    assert high[0] < state["max"][0]


@pytest.mark.parametrize("bits", [4])
def test_the_short_end_of_silu_is_kept(bits):
    plan = plan_of("conv", bits)
    inputs = {group: F.silu(2 * inputs_of("conv", group)) for group in TIMES}
    state = state_of(plan, inputs)
    low, _ = output_of(plan, inputs).ranges(state, 99.99)
    assert (low <= 0.99 * state["min"]).all()
    assert (state["min"] > -0.28).all()  # SiLU's least value


# ---- bias correction ----------------------------------------------------------------------------


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_corrected_outputs_have_no_mean_error(kind, smoothed):
    plan = plan_of(kind)
    inputs = {group: inputs_of(kind, group) for group in (0, 2)}
    factor = SmoothingFactor(torch.linspace(0.5, 2, 6), 0, None) if smoothed else IDENTITY
    exact = plan.layer.weight.detach()
    folded = fold(exact, factor.factor)
    codes, (scale, zero), _ = round_nearest(folded, weight_spec(4))
    shape = [-1] + [1] * (exact.ndim - 1)
    weight = (codes - zero.reshape(shape)) * scale.reshape(shape)
    spec = activation_spec(4)
    qparams = choose_qparams(torch.tensor([-2.0, 0, -6]), torch.tensor([4.0, 1, 9]), spec)
    correction = output_of(plan, inputs, factor).bias_correction(weight, qparams, 3)
    assert correction.shape == (3, 5)
    assert torch.equal(correction[1], torch.zeros(5))
    axis = 1 if kind == "conv" else -1
    for group, x in inputs.items():
        y = smooth(x, factor.factor, axis)
        at_group = QParams(qparams.scale[group], qparams.zero_point[group])
        lost = plan.apply(x, exact) - plan.apply(fake_quantize(y, at_group, spec), weight)
        mean = lost.movedim(axis, 0).flatten(1).mean(1)
        assert mean.abs().max() > 1e-3
        assert (mean - correction[group]).abs().max() < 1e-5


def config_of(tiny_model: Path, **changes) -> Config:
    common = {
        "sampling__steps": 2,
        "calibration": {"trajectories": 2, "batch_size": 2, "noise_trajectories": 1},
        "quantization__weights__rounding": "nearest",
        "quantization__activations__timestep_groups": 2,
        "quantization__activations__observer": "output",
        "quantization__bias_correction": True,
    }
    return parse_config(tiny_config(tiny_model, **{**common, **changes}), "test")


def test_corrected_layers_are_written_read_and_computed_alike(tiny_model, tmp_path):
    model = load_model(str(tiny_model))
    config = config_of(tiny_model)
    quantized = quantize.run(config, model, *calibrate.run(config, model)).quantized
    artifacts.write(tmp_path / "quantized.safetensors", quantized)
    found = artifacts.read(tmp_path / "quantized.safetensors", "quantized")
    assert found.digest == quantized.digest
    corrections = [found.tensors[f"{name}.bias_correction"] for name in found.body["layers"]]
    assert all(c.shape[0] == 2 and torch.isfinite(c).all() for c in corrections)
    # all but those of the layers that read the condition, the same at every timestep
    assert sum(bool((c[0] != c[1]).any()) for c in corrections) > 0.7 * len(corrections)
    condition = model.condition(torch.tensor([0, 1]))
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    simulated = quantized_denoiser(model, found, "simulate", True)
    seen = []

    def compare(layer: QuantizedLayer, args: tuple, theirs: torch.Tensor) -> None:
        ours = int8.compute(layer, args[0])
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
        seen.append(layer)

    for layer in simulated.module.modules():
        if isinstance(layer, QuantizedLayer):
            layer.register_forward_hook(compare)
    outputs = [simulated(x, t, condition) for t in (501.0, 1.0)]
    assert len(seen) == 2 * len(corrections)
    without = {k: torch.zeros_like(v) if "bias_corr" in k else v for k, v in found.tensors.items()}
    bare = Artifact("quantized", without, found.body, found.config, found.model)
    plain = quantized_denoiser(model, bare, "simulate", True)(x, 1.0, condition)
    assert (plain - outputs[1]).norm() > 1e-3 * plain.norm()


# ---- inputs of more than 8 bits -----------------------------------------------------------------


@pytest.mark.parametrize("bits", [9, 12, 16])
def test_wide_inputs_reach_beyond_all_groups(tiny_model, bits):
    plan = plan_of("linear", bits)
    seen = {group: inputs_of("linear", group) for group in (0, 2)}
    state = state_of(plan, seen)
    tensors = {f"layer.input_{name}": value for name, value in state.items()}
    calibration = Artifact("calibration", tensors, {}, "c" * 16, "m" * 16)
    job = QuantizationJob(
        config_of(tiny_model), load_model(str(tiny_model)), calibration, [plan], {}
    )
    found = input_qparams(job, plan, None)
    assert found is not None
    least = min(float(x.min()) for x in seen.values())
    most = max(float(x.max()) for x in seen.values())
    top = (2**bits - 1 - found.zero_point) * found.scale
    bottom = -found.zero_point * found.scale
    assert found.scale.shape == (3,)
    assert (top - MARGIN * most).abs().max() <= found.scale.max()
    assert (bottom - MARGIN * least).abs().max() <= found.scale.max()


@pytest.mark.parametrize(("name", "margin"), [("conv_in", 1.5), ("mid_block.layer", 1.0)])
def test_the_first_layer_alone_reaches_beyond_the_noise_that_calibration_saw(
    tiny_model, name, margin
):
    plan = replace(plan_of("linear", 8), name=name, observer="minmax")
    state = state_of(plan, {0: inputs_of("linear", 0)})
    tensors = {f"{name}.input_{key}": value for key, value in state.items()}
    calibration = Artifact("calibration", tensors, {}, "c" * 16, "m" * 16)
    model = load_model(str(tiny_model))
    spans = []
    for first_margin in (1.0, 1.5):
        config = config_of(tiny_model)
        quantization = config.quantization.model_copy(update={"first_margin": first_margin})
        config = config.model_copy(update={"quantization": quantization})
        found = input_qparams(QuantizationJob(config, model, calibration, [plan], {}), plan, None)
        assert found is not None
        spans.append(255 * found.scale[0])
    assert spans[1] / spans[0] == pytest.approx(margin, rel=0.01)
