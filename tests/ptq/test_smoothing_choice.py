"""Smoothing factors as the calibrate stage chooses them, on the tiny model."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config
from torch import nn

from qncd_cli.config.loading import parse_config
from qncd_cli.forecast import artifacts
from qncd_cli.forecast.shapes import model_shapes
from qncd_cli.models.loading import DiffusionModel, load_model
from qncd_cli.models.topology import skip_boundaries
from qncd_cli.progress import no_progress
from qncd_cli.ptq.layer_plan import plan_layers
from qncd_cli.ptq.smoothing_choice import Described, Factors, choose_factors, factors_of
from qncd_cli.runtime import trajectory
from qncd_cli.runtime.denoiser import full_denoiser, quantized_denoiser
from qncd_cli.stages import calibrate, quantize
from qncd_cli.store.artifacts import Artifact


@pytest.fixture(scope="module")
def model(tiny_model) -> DiffusionModel:
    return load_model(str(tiny_model))


def choose(model: DiffusionModel, intra: str, **changes) -> tuple[Factors, Described]:
    quick = {"sampling__steps": 2, "calibration": {"trajectories": 2, "noise_trajectories": 2}}
    tree = tiny_config(model.source, **quick, correction__intra=intra, **changes)
    config = parse_config(tree, "test")
    timesteps = trajectory.timesteps(config, model)
    return choose_factors(config, model, full_denoiser(model), timesteps, no_progress)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_auto_is_never_worse_than_none_by_its_own_measure(model, rounding):
    factors, described = choose(model, "auto", quantization__weights__rounding=rounding)
    assert factors.keys() == described.keys()
    assert len({entry["chosen"] for entry in described.values()}) > 1
    for name, entry in described.items():
        errors = entry["judged_error"]
        assert errors[entry["chosen"]] == min(errors.values()), name
        assert errors[entry["chosen"]] <= errors["none"], name
        assert ("split" in errors) == (name in skip_boundaries(model.denoiser)), name
        assert all(0 < error < 1 for error in errors.values()), name


def padded(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and (layer.padding != (0, 0) or layer.kernel_size != (1, 1))


@pytest.mark.parametrize("intra", ["range", "auto"])
def test_only_layers_without_padding_are_shifted(model, intra):
    factors, described = choose(model, intra, correction__smoothing_strength=1.0)
    layers = {name: model.denoiser.get_submodule(name) for name in factors}
    shifted = {name for name, factor in factors.items() if factor.shift is not None}
    assert shifted == {name for name, entry in described.items() if entry["shifted"]}
    assert not any(padded(layers[name]) for name in shifted)
    if intra == "range":  # every layer, and every one that may be is shifted
        config = parse_config(tiny_config(model.source), "test")
        assert list(factors) == [plan.name for plan in plan_layers(config, model.denoiser)]
        assert shifted == {name for name, layer in layers.items() if not padded(layer)}
    for factor in factors.values():
        assert torch.isfinite(factor.factor).all() and (factor.factor > 0).all()


@pytest.mark.parametrize("bits", [4, 32])
def test_layers_behind_a_skip_connection_are_split_whatever_the_widths(model, bits):
    """The artifact serves every width: it is not made again when only the widths change."""
    widths = {"quantization__weights__bits": bits, "quantization__activations__bits": bits}
    boundaries = skip_boundaries(model.denoiser)
    factors, described = choose(model, "none", **widths)
    assert factors.keys() == boundaries.keys()
    assert {entry["chosen"] for entry in described.values()} == {"split"}
    for name, (factor, _, shift, _) in factors.items():
        assert shift is None
        parts = factor[: boundaries[name]], factor[boundaries[name] :]
        assert all(len(part.unique()) == 1 for part in parts)
    without = {"quantization__split_skip_connections": False}
    assert choose(model, "none", **widths, **without) == ({}, {})
    both, described = choose(model, "embedding", **widths)
    assert {entry["chosen"] for entry in described.values()} == {"split", "embedding"}
    assert boundaries.keys() < both.keys()


def test_factors_of_an_artifact_are_those_that_went_in(model):
    factors, described = choose(model, "range")
    tensors = {f"{n}.smoothing": f.factor for n, f in factors.items()}
    tensors |= {f"{n}.shift": f.shift for n, f in factors.items() if f.shift is not None}
    found = factors_of(Artifact("smoothing", tensors, {"layers": described}, "c" * 16, "m" * 16))
    assert found.keys() == factors.keys()
    for name, (factor, clamped, shift, _) in factors.items():
        assert torch.equal(found[name].factor, factor)
        assert found[name].clamped == clamped
        assert (found[name].shift is None) == (shift is None)
        assert shift is None or torch.equal(found[name].shift, shift)


def rotated_layers(model: DiffusionModel, factors: Factors) -> set[str]:
    assert all(factors[name].rotation in (0, 4) for name in factors)
    return {name for name, factor in factors.items() if factor.rotation}


def test_linear_layers_that_read_features_are_rotated_and_no_others(model):
    factors, described = choose(model, "none", quantization__rotation=4)
    rotated = rotated_layers(model, factors)
    assert {name for name in described if described[name].get("rotated")} == rotated
    plans = plan_layers(parse_config(tiny_config(model.source), "test"), model.denoiser)
    linear = {p.name for p in plans if not p.is_conv}
    assert {name for name in linear if ".attn1." in name} <= rotated <= linear
    assert all(torch.equal(factors[n].factor, torch.ones(len(factors[n].factor))) for n in rotated)
    smoothed, _ = choose(model, "smoothquant", quantization__rotation=4)
    assert not rotated_layers(model, smoothed)


def test_a_rotated_model_is_sampled_as_it_was_and_the_forecast_knows_its_tensors(model):
    tree = tiny_config(model.source, correction__intra="none", quantization__rotation=4)
    tree["quantization"]["weights"]["bits"] = tree["quantization"]["activations"]["bits"] = 8
    config = parse_config(tree, "test")
    calibration, smoothing = calibrate.run(config, model)
    made = quantize.run(config, model, calibration, smoothing).quantized
    shapes = model_shapes(model.source, torch.float32)
    foretold = artifacts.smoothing(config, shapes)
    assert foretold.tensors.keys() == smoothing.tensors.keys()
    assert artifacts.quantized(config, shapes, calibration, foretold).tensors.keys() == (
        made.tensors.keys()
    )
    full = trajectory.draw(config, model, full_denoiser(model), [0, 1])
    denoiser = quantized_denoiser(model, made, "simulate", True)
    assert any(getattr(part, "rotation", 0) for part in denoiser.module.modules())
    quantized = trajectory.draw(config, model, denoiser, [0, 1])
    assert (quantized - full).square().mean() < 1e-2 * full.square().mean()
