"""What is foreseen of artifacts and memory against what is written and held."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_config

from qncd_cli.config.loading import load_config
from qncd_cli.config.schema import Config
from qncd_cli.forecast import artifacts as foreseen
from qncd_cli.forecast import memory
from qncd_cli.forecast.memory import Foreseen
from qncd_cli.forecast.shapes import Shapes, model_shapes
from qncd_cli.models.loading import load_model
from qncd_cli.ptq.cost import HEADROOM, Cost, DenoiserCall
from qncd_cli.ptq.coverage import coverage_of
from qncd_cli.ptq.layer import GPTQ_MATRICES, quantize_layer
from qncd_cli.ptq.layer_plan import plan_layers
from qncd_cli.quant.affine import QParams
from qncd_cli.quant.smoothing import IDENTITY
from qncd_cli.runtime.denoiser import denoiser_costs
from qncd_cli.stages import calibrate, quantize, sample
from qncd_cli.store import artifacts
from qncd_cli.store.artifacts import Artifact
from qncd_cli.store.layer_entry import bodies

FEW = {"trajectories": 2, "batch_size": 2, "noise_trajectories": 1}
NEAREST = {"bits": 4, "rounding": "nearest"}
MINMAX = {"bits": 8, "observer": "minmax"}
ONE_BLOCK = {"*": {"weights": {"bits": 4}}, "mid_block.resnets.*": {}}  # quick to measure


def shapes_of(config: Config) -> Shapes:
    return model_shapes(config.model.source, torch.float32)


def foreseen_of(config: Config, shapes: Shapes) -> tuple[Artifact, Artifact, Artifact]:
    steps = [float(t) for t in range(config.sampling.steps)]
    calibration = foreseen.calibration(config, shapes, steps)
    smoothing = foreseen.smoothing(config, shapes)
    return calibration, smoothing, foreseen.quantized(config, shapes, calibration, smoothing)


def written(folder: Path, *parts: Artifact) -> list[int]:
    for part in parts:
        artifacts.write(folder / part.kind, part)
    return [(folder / part.kind).stat().st_size for part in parts]


@pytest.mark.parametrize(
    ("quantization", "intra"),
    [
        ({"preset": "best", "weights": NEAREST}, "none"),
        ({"preset": "minmax", "weights": {"bits": 8}}, "range"),
        ({"preset": "qncd", "weights": {**NEAREST, "bits": 3}}, "embedding"),
        ({"weights": {**NEAREST, "bits": 2}, "activations": MINMAX}, "smoothquant"),
        ({"weights": {**NEAREST, "budget": 4.5}, "overrides": ONE_BLOCK}, "embedding"),
        ({"weights": {"bits": 32}, "bias_correction": True}, "embedding"),
    ],
    ids=["best-w4", "minmax-w8", "qncd-w3", "smoothed-w2", "budget", "float-weights"],
)
def test_bytes_of_the_artifacts_at_any_setting(tiny_model, tmp_path, quantization, intra):
    tree = tiny_config(tiny_model, sampling__steps=2, calibration=FEW, correction__intra=intra)
    tree["quantization"] = quantization
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(str(tmp_path / "c.yaml"))
    model = load_model(config.model.source)
    calibration, smoothing = calibrate.run(config, model)
    quantized = quantize.run(config, model, calibration, smoothing).quantized
    shapes = shapes_of(config)
    found = foreseen_of(config, shapes)
    costs = denoiser_costs(config, model)
    bits = [
        coverage_of(config, denoiser, costs, artifact, 4)["mean_input_bits"]
        for denoiser, artifact in ((shapes.denoiser, found[2]), (model.denoiser, quantized))
    ]
    more = foreseen.extra_input_bits(config, plan_layers(config, shapes.denoiser))
    assert bits[0] <= bits[1] <= bits[0] + more
    assert bits[1] == pytest.approx(bits[0] + more, abs=0.05)
    bytes_found = [*map(foreseen.file_bytes, found[:2])]
    bytes_found.append(foreseen.result_bytes(config, shapes, found[2]))
    expected = written(tmp_path, calibration, smoothing, quantized)
    assert bytes_found == pytest.approx(expected, rel=0.02)


def test_bytes_of_a_packaged_model(tmp_path):
    """Its layers rounded without calibration: that changes values, not bytes."""
    config = load_config("fashion_ldm_w8a8", ["quantization.preset=minmax"])
    model, shapes = load_model(config.model.source), shapes_of(config)
    predicted = foreseen_of(config, shapes)[2]
    groups = predicted.body["groups"]
    tensors, entries = {}, {}
    for plan in plan_layers(config, model.denoiser):
        qparams = QParams(torch.ones(groups), torch.zeros(groups, dtype=torch.int32))
        found, entries[plan.name] = quantize_layer(plan, qparams, IDENTITY, None)
        tensors |= {f"{plan.name}.{key}": value for key, value in found.items()}
    for name in predicted.tensors.keys() - tensors.keys():  # of attention
        like = predicted.tensors[name]
        tensors[name] = torch.zeros(like.shape, dtype=like.dtype)
    real = replace(predicted, tensors=tensors, body={**predicted.body, "layers": bodies(entries)})
    assert foreseen.result_bytes(config, shapes, predicted) == pytest.approx(
        written(tmp_path, real)[0], rel=0.001
    )


def test_memory_follows_what_the_phases_hold(tmp_path):
    """Against sizes that can be told by hand."""
    config = load_config("fashion_ldm_w4a8", ["calibration.trajectories=1000"])
    shapes = shapes_of(config)
    parts = foreseen_of(config, shapes)
    sizes = Foreseen.of(*parts)
    call = DenoiserCall(2, 50, 1e6, 2e6, 3e6, 4e6, 1000, 10_000)
    denoiser, held = shapes.denoiser, 10_000_000

    def phases(batch: int) -> dict[str, float]:
        settings = config.calibration.model_copy(
            update={"batch_size": batch, "noise_trajectories": 1000}
        )
        changed = config.model_copy(update={"calibration": settings})
        calibrating = calibrate.costs(changed, denoiser, shapes.classes, call)
        quantizing = quantize.costs(changed, denoiser, call)
        return {
            **memory.calibrate_phases(shapes, held, sizes, calibrating),
            **memory.quantize_phases(shapes, held, sizes, quantizing),
        }

    small, large = phases(8), phases(108)
    grown = {name: large[name] - small[name] for name in small}
    assert grown["trajectories"] == pytest.approx(HEADROOM * 200 * call.full)
    assert grown["measuring noise"] == pytest.approx(HEADROOM * 200 * call.simulated)
    assert grown["GPTQ of the widest layers"] == 0
    widest = max(p.in_features for p in plan_layers(config, denoiser))
    assert small["GPTQ of the widest layers"] - held > (1 + GPTQ_MATRICES) * 4 * widest**2
    drawing = sample.costs(call, Cost(), 50, 50, slower=1.5)
    drawn = memory.sample_phases(shapes, held, sizes, call.weights, drawing)
    assert drawn["denoising"] > held + sizes.quantized + call.weights + 100 * call.simulated
