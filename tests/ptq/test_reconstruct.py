"""Rounding learnt on the tiny model: better than its start, clean behind itself, repeatable."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch import nn

from qncd_cli.config.loading import parse_config
from qncd_cli.config.schema import Config
from qncd_cli.models.loading import DiffusionModel, load_model
from qncd_cli.models.topology import reconstruction_blocks, weight_layers
from qncd_cli.progress import no_progress
from qncd_cli.ptq import learn_block, reconstruct
from qncd_cli.ptq.block_calls import BlockCalls, CalibrationRows, record
from qncd_cli.ptq.job import QuantizationJob
from qncd_cli.quant.packing import unpack
from qncd_cli.runtime.denoiser import full_denoiser
from qncd_cli.spec import weight_spec
from qncd_cli.stages import calibrate, quantize
from qncd_cli.store import artifacts
from qncd_cli.store.artifacts import Artifact

RESNET = "down_blocks.1.resnets.0"
TRANSFORMER = "down_blocks.1.attentions.0.transformer_blocks.0"


def config_of(tiny_model: Path, rounding: str, **weights) -> Config:
    tree = tiny_config(
        tiny_model,
        quantization__overrides={
            "*": {"weights": {"bits": 32}, "activations": {"bits": 32}},
            f"{RESNET}.*": {"weights": {"bits": 3}, "activations": {"bits": 8}},
            f"{TRANSFORMER}.*": {"weights": {"bits": 3}, "activations": {"bits": 8}},
        },
        quantization__activations__timestep_groups=2,
        calibration__noise_trajectories=1,
    )
    tree["quantization"]["weights"] |= {"rounding": rounding, "iterations": 40, **weights}
    return parse_config(tree, "here")


@pytest.fixture(scope="module")
def model(tiny_model) -> DiffusionModel:
    return load_model(str(tiny_model))


@pytest.fixture(scope="module")
def calibrated(tiny_model, model) -> tuple[Artifact, Artifact]:
    return calibrate.run(config_of(tiny_model, "gptq"), model)


@pytest.fixture(scope="module")
def nearest(tiny_model, model, calibrated) -> Artifact:
    return quantize.run(config_of(tiny_model, "nearest"), model, *calibrated).quantized


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    """Where temporary files go; empty before."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def learn(config, model, calibrated, start) -> Artifact:
    job = QuantizationJob(config, model, calibrated[0], [], {})
    return reconstruct.reconstruct(job, start, no_progress)


def blocks_of(artifact: Artifact) -> dict[str, dict]:
    entries = artifact.body["layers"].values()
    found = [e["reconstruction"] for e in entries if "reconstruction" in e]
    return {report["block"]: report for report in found}


@pytest.mark.parametrize("method", ["adaround", "brecq"])
def test_learning_improves_on_nearest_and_leaves_no_files(
    tiny_model, model, calibrated, nearest, scratch, method
):
    result = learn(config_of(tiny_model, method), model, calibrated, nearest)
    reports = blocks_of(result)
    before = sum(r["relative_output_error_before"] for r in reports.values())
    after = sum(r["relative_output_error_after"] for r in reports.values())
    assert after < 0.9 * before
    assert len(reports) == (2 if method == "brecq" else 13)
    changed = False
    for name, entry in result.body["layers"].items():
        if "reconstruction" not in entry:
            continue
        kept = entry["reconstruction"]["kept"]
        assert entry["rounding"] == (method if kept else "nearest")
        same = torch.equal(result.tensors[f"{name}.weight"], nearest.tensors[f"{name}.weight"])
        assert same or kept
        changed |= not same
        codes = unpack(result.tensors[f"{name}.weight"], 3, tuple(entry["weight_shape"]))
        assert codes.min() >= 0
        assert codes.max() <= weight_spec(3).qmax
    assert changed
    artifacts.seal(result)
    assert not list(scratch.iterdir())


def test_a_result_that_does_not_help_is_dropped(
    tiny_model, model, calibrated, nearest, monkeypatch
):
    monkeypatch.setattr(learn_block, "LOGIT_TRAVEL", 300.0)  # codes fall anywhere
    result = learn(config_of(tiny_model, "brecq", iterations=3), model, calibrated, nearest)
    assert {r["kept"] for r in blocks_of(result).values()} == {False}
    for report in blocks_of(result).values():
        assert report["relative_output_error_after"] == report["relative_output_error_before"]
    for name, tensor in nearest.tensors.items():
        assert torch.equal(result.tensors[name], tensor)


def test_files_are_removed_after_an_exception(
    tiny_model, model, calibrated, nearest, scratch, monkeypatch
):
    def fail(block, *rest):
        assert list(scratch.rglob("*.bin"))
        raise KeyboardInterrupt

    monkeypatch.setattr(reconstruct, "learn_block", fail)
    with pytest.raises(KeyboardInterrupt):
        learn(config_of(tiny_model, "brecq"), model, calibrated, nearest)
    assert not list(scratch.iterdir())
    assert not any(m._forward_pre_hooks for m in model.denoiser.modules())


def test_brecq_from_gptq_is_better_and_two_runs_write_the_same_bytes(
    tiny_model, model, calibrated, tmp_path
):
    config = config_of(tiny_model, "brecq", learn_bias=True, learn_input_scale=True)
    written = []
    for run in ("a", "b"):
        result = quantize.run(config, model, *calibrated).quantized
        artifacts.write(tmp_path / run, result)
        written.append((tmp_path / run).read_bytes())
    assert written[0] == written[1]
    read = artifacts.read(tmp_path / "a", "quantized")
    gptq = quantize.run(config_of(tiny_model, "gptq"), model, *calibrated).quantized
    reports = blocks_of(read)
    assert any(r["kept"] for r in reports.values())
    for report in reports.values():
        assert report["relative_output_error_after"] <= report["relative_output_error_before"]
    kept = [n for n, e in read.body["layers"].items() if e["rounding"] == "brecq"]
    for part in ("weight", "bias", "input_scale"):
        names = [f"{n}.{part}" for n in kept if f"{n}.{part}" in gptq.tensors]
        assert any(not torch.equal(read.tensors[n], gptq.tensors[n]) for n in names)
    assert all((read.tensors[f"{n}.input_scale"] > 0).all() for n in kept)


def test_every_layer_is_in_one_block(model):
    names = list(weight_layers(model.denoiser))
    grouped = reconstruction_blocks(model.denoiser, names)
    assert sorted(n for layers in grouped.values() for n in layers) == sorted(names)
    assert f"{RESNET}.conv1" in grouped[RESNET]
    assert f"{TRANSFORMER}.ff.net.2" in grouped[TRANSFORMER]
    assert grouped["conv_in"] == ["conv_in"]


def test_recorded_calls_repeat_what_the_block_computed(tiny_model, model, calibrated, tmp_path):
    """Arguments by position and by name: features, timestep embedding, context."""
    config = config_of(tiny_model, "brecq")
    rows = CalibrationRows(config, model, calibrated[0], 8)
    denoiser = full_denoiser(model)
    calls = record(rows, denoiser, [TRANSFORMER, RESNET], tmp_path, arguments=True, output=True)
    assert list(calls) == [RESNET, TRANSFORMER]
    samples = torch.tensor([3, 0, len(rows) - 1])
    for name, block in calls.items():
        args, kwargs = block.arguments(samples, model.device)
        with torch.no_grad():
            found = model.denoiser.get_submodule(name)(*args, **kwargs)
        assert torch.allclose(found, block.output(samples, model.device), atol=1e-5)
    assert len(rows) == 16  # with guidance, two samples to a row
    assert 0 < rows.held_out.sum() < len(rows)


def test_calls_that_differ_in_more_than_their_rows_are_refused(tmp_path):
    block = BlockCalls(tmp_path, 4)
    block.put_arguments(0, 2, (torch.zeros(2, 3),), {"scale": 1.0})
    with pytest.raises(ValueError, match="same arguments"):
        block.put_arguments(2, 2, (torch.zeros(2, 3),), {"scale": 2.0})
    with pytest.raises(ValueError, match="same arguments"):
        block.put_arguments(2, 2, (torch.zeros(2, 3),), {})


def test_the_denoiser_stops_behind_the_last_recorded_block(tiny_model, model, calibrated, tmp_path):
    reached = []
    conv_out = model.denoiser.get_submodule("conv_out")
    assert isinstance(conv_out, nn.Conv2d)
    handle = conv_out.register_forward_pre_hook(lambda *_: reached.append(1))
    try:
        rows = CalibrationRows(config_of(tiny_model, "brecq"), model, calibrated[0], 4)
        record(rows, full_denoiser(model), [RESNET], tmp_path, arguments=True, output=False)
    finally:
        handle.remove()
    assert not reached
