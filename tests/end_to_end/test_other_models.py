"""All stages with preset best on models of other kinds than the packaged latent U-Net."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Qncd, tiny_config
from safetensors.torch import load_file

RUN = Path("runs/tiny")


def write_inputs(runner: Qncd, model: Path, intra: str) -> None:
    tree = tiny_config(model, sampling__steps=3)
    tree["calibration"] = {"trajectories": 2, "batch_size": 2, "noise_trajectories": 2}
    tree["quantization"] = {"preset": "best", "weights": {"bits": 4}, "activations": {"bits": 8}}
    tree["correction"] = {"intra": intra}
    runner.write_config(tree)


@pytest.mark.parametrize(("kind", "intra"), [("pixel", "none"), ("dit", "embedding")])
def test_preset_best_from_calibration_to_evaluation(tmp_path, request, kind, intra):
    runner = Qncd(tmp_path)
    write_inputs(runner, request.getfixturevalue(f"tiny_{kind}_model"), intra)
    runner("calibrate", "--config", "tiny.yaml")
    runner("quantize")
    runner("sample", "--num", "4")
    metrics = runner("eval", "--json").data
    assert metrics["protocol"]["num_samples"] == 4
    assert 10 < metrics["fidelity"]["sqnr_latents_db"] < 100
    coverage = json.loads((tmp_path / RUN / "coverage.json").read_text())
    assert coverage["integer_macs_share"] > 0.9
    widths = [(row["weight_bits"], row["activation_bits"]) for row in coverage["layers"]]
    assert (4, 8) in widths
    assert {*widths} - {(4, 8), (8, 16)}  # the layers that matter most
    refused = runner("sample", "--num", "4", "--inter", "runtime", "--name", "corrected", ok=False)
    assert refused.exit_code == 4 and "without what the runtime correction" in refused.stderr
    runner("quantize", "--set", "correction.inter.method=runtime")
    runner("sample", "--num", "4", "--name", "corrected")
    plain, corrected = (
        load_file(tmp_path / RUN / "samples" / name / "latents.safetensors")["latents"]
        for name in ("quantized", "corrected")
    )
    assert plain.shape == corrected.shape and torch.isfinite(corrected).all()
    change = float((corrected - plain).norm() / plain.norm())
    assert change < 0.5  # 0 where no reading is believed
    manifest = json.loads((tmp_path / RUN / "samples" / "corrected" / "manifest.json").read_text())
    assert manifest["extra_calls"] > 0
