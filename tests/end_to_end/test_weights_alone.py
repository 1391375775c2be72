"""`--bits w4a16` from calibration to evaluation: weights of 4 bits, every input as it is."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import SHALLOW, Qncd, save_tiny_pipeline
from safetensors.torch import load_file

from qncd_cli.store import artifacts


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Qncd, str]:
    """The four stages with `run`, of a configuration that `init` would write."""
    folder = tmp_path_factory.mktemp("weights-alone")
    save_tiny_pipeline(folder / "model", **SHALLOW)
    qncd = Qncd(folder)
    few = ("sampling.steps=4", "calibration.trajectories=6", "calibration.noise_trajectories=3")
    settings = [word for pair in few for word in ("--set", pair)]
    qncd("run", "model", "--bits", "w4a16", "--num", "4", *settings)
    return qncd, "runs/model_w4a16"


def latents(qncd: Qncd, run: str, name: str) -> torch.Tensor:
    return load_file(qncd.folder / run / "samples" / name / "latents.safetensors")["latents"]


def test_no_input_is_quantized_and_the_coverage_says_so(ran):
    qncd, run = ran
    artifact = artifacts.read(qncd.folder / run / "quantized.safetensors", "quantized")
    entries = artifact.body["layers"].values()
    assert {entry["activation_bits"] for entry in entries} == {32}
    assert {entry["weight_bits"] for entry in entries} <= {2, 3, 4, 6, 8, 15}
    assert not [name for name in artifact.tensors if name.endswith(("input_scale", "query_scale"))]
    coverage = json.loads((qncd.folder / run / "coverage.json").read_text())
    reasons = {row["why_not_integer"] for row in coverage["layers"] if row["weight_bits"] < 32}
    assert reasons == {"weights alone are quantized"}
    assert coverage["integer_macs_share"] == 0
    assert coverage["weight_code_bytes"] < coverage["float_denoiser_bytes"] / 4
    metrics = json.loads((qncd.folder / run / "metrics.json").read_text())
    assert metrics


def test_the_plan_says_so(ran):
    qncd, _ = ran
    said = qncd("run", "model", "--bits", "w4a16", "--plan", "--run-dir", "other").stdout
    assert re.search(r"0 quantized, [1-9]\d* in their weights alone", " ".join(said.split()))


def test_every_backend_and_low_memory_draw_the_same(ran, monkeypatch):
    """To float rounding, which nothing rounds to another code."""
    pytest.importorskip("triton")
    qncd, run = ran
    how = ("sample", "--run-dir", run, "--num", "1", "--steps", "1", "--inter", "none")
    qncd(*how, "--backend", "simulate", "--name", "simulate")
    qncd(*how, "--backend", "simulate", "--low-memory", "--name", "low")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    qncd(*how, "--backend", "cuda-int8", "--name", "cuda")
    expected = latents(qncd, run, "simulate")
    assert torch.equal(latents(qncd, run, "low"), expected)
    cuda = latents(qncd, run, "cuda")
    assert not torch.equal(cuda, expected)
    assert float((cuda - expected).norm() / expected.norm()) < 1e-4
