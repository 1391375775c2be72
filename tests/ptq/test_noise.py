"""Statistics of the noise: those that a correction needs, and no others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_config

from qncd_cli.config.correction import PAIRS, RUNTIME, STEPWISE
from qncd_cli.config.loading import parse_config
from qncd_cli.forecast.shapes import model_shapes
from qncd_cli.models.loading import load_model
from qncd_cli.progress import Track
from qncd_cli.ptq import noise, reuse
from qncd_cli.ptq.cost import DenoiserCall
from qncd_cli.stages import calibrate, quantize
from qncd_cli.store import artifacts

STEPS = 3
FEW = {"trajectories": 4, "batch_size": 2, "noise_trajectories": 4}


def config_with(folder, **inter):
    tree = tiny_config(
        folder,
        sampling__steps=STEPS,
        calibration=FEW,
        quantization__weights={"bits": 4, "rounding": "nearest"},
        quantization__activations__observer="minmax",
        correction={"intra": "none", "inter": inter},
    )
    return parse_config(tree, "test")


@pytest.fixture(scope="module")
def made(tiny_model):
    """Model, quantized artifact, and the statistics of a run without inter correction."""
    config, model = config_with(tiny_model, method="none"), load_model(str(tiny_model))
    found = quantize.run(config, model, *calibrate.run(config, model))
    return model, found.quantized, found.noise_stats


def counting(totals: list[tuple[int, int]]) -> Track:
    """A Track that notes how many units were announced and how many came."""

    def track(items, description, total, unit):
        came = 0
        for item in items:
            came += unit in ("calls", "steps")
            yield item
        totals.append((total, came))

    return track


@pytest.fixture(scope="module")
def fitted(tiny_model, made):
    """Statistics for a correction that reads the pairs alone."""
    return noise.measure_noise(config_with(tiny_model, method="ptqd"), *made[:2], counting([]))


@pytest.mark.parametrize(
    ("inter", "measured"),
    [
        ({"method": "none"}, []),
        ({"method": "runtime", "baseline": "none"}, []),
        ({"method": "affine"}, [PAIRS]),
        ({"method": "runtime"}, [PAIRS, RUNTIME]),
        ({"method": "stepwise"}, [PAIRS, STEPWISE]),
    ],
)
def test_a_correction_gets_the_statistics_that_it_needs_and_the_noise_is_the_same(
    tiny_model, made, fitted, inter, measured
):
    model, quantized, look = made
    totals: list[tuple[int, int]] = []
    config = config_with(tiny_model, **inter)
    found = noise.measure_noise(config, model, quantized, counting(totals))
    assert found.body["measured"] == measured
    kinds = {name.partition("_")[0] for name in found.tensors}
    assert kinds & {RUNTIME, STEPWISE} == {*measured} - {PAIRS}
    for name, tensor in (fitted if measured else look).tensors.items():
        assert torch.equal(found.tensors[name], tensor), name
    assert totals and all(total == came for total, came in totals)


def test_where_no_correction_reads_the_noise_few_trajectories_show_it(made, fitted):
    look = made[2].tensors
    assert torch.equal(look["timesteps"], fitted.tensors["timesteps"])
    seen, known = (t["variance"].mean() for t in (look, fitted.tensors))
    assert not torch.equal(seen, known) and 0.5 < float(seen / known) < 2


def test_what_else_is_asked_for_is_measured_as_if_it_alone_were(tiny_model, made, tmp_path):
    model, quantized, _ = made
    none = config_with(tiny_model, method="none")
    both = noise.measure_noise(none, model, quantized, counting([]), also=(RUNTIME, STEPWISE))
    artifacts.write(tmp_path / "noise_stats.safetensors", both)
    assert both.body["measured"] == [PAIRS, RUNTIME, STEPWISE]
    for method in (RUNTIME, STEPWISE):
        config = config_with(tiny_model, method=method)
        alone = noise.measure_noise(config, model, quantized, counting([]))
        assert {*alone.tensors} < {*both.tensors}
        for name, tensor in alone.tensors.items():
            assert torch.equal(both.tensors[name], tensor), name


def test_statistics_without_what_they_say_that_they_hold_are_refused(made, tmp_path):
    plain = made[2]
    body = {**plain.body, "measured": [RUNTIME]}
    with pytest.raises(Exception, match="runtime_mean"):
        artifacts.write(tmp_path / "noise_stats.safetensors", replace(plain, body=body))


@pytest.mark.parametrize("part", [noise, reuse])
def test_a_forecast_without_weights_takes_the_kernels_that_the_stage_takes(tiny_model, part):
    config, model = config_with(tiny_model, method="none"), load_model(str(tiny_model))
    shapes = model_shapes(str(tiny_model), torch.float32)
    assert next(shapes.denoiser.parameters()).is_meta
    call = DenoiserCall(2, STEPS, 1e6, 2e6, 3e6, 4e6, 1000, 10_000)
    assert part.cost(config, shapes.denoiser, call) == part.cost(config, model.denoiser, call)
