"""Metrics on request whose weights are files: measured where they are, and one line where not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Qncd, tiny_config
from metrics.shared import save_clip, save_lpips

from qncd_cli.store.files import read_json

RUN = Path("runs/tiny")


@pytest.fixture
def work(sampled, tmp_path) -> Qncd:
    return Qncd(shutil.copytree(sampled, tmp_path / "work"))


def metrics_of(runner: Qncd) -> dict:
    found: dict = read_json(runner.folder / RUN / "metrics.json", "qncd eval")
    return found


def test_what_cannot_be_had_fails_in_the_end_with_all_else_written(work):
    (work.folder / "empty").mkdir()
    found = work("eval", "--lpips", "--lpips-weights", "empty", ok=False)
    assert found.exit_code == 6
    assert "--lpips: cannot be measured, all else is written: no LPIPS weights in" in found.stderr
    found = work("eval", "--clip", "empty", ok=False)
    assert found.exit_code == 6
    assert "no CLIP model: config.json" in found.stderr
    metrics = metrics_of(work)
    assert metrics["fidelity"]["lpips"] is None and metrics["fidelity"]["psnr_db"] > 0
    assert metrics["protocol"]["lpips_sha256"] is None
    found = work("eval", "--clip", "nowhere", ok=False)
    assert (found.exit_code, "--clip nowhere: no such" in found.stderr) == (4, True)


def test_lpips_stands_in_the_record_with_its_weights_and_later_metrics_keep_it(work):
    save_lpips(work.folder / "lpips")
    flags = ("--lpips", "--lpips-weights", "lpips")
    work("eval", *flags)
    first = metrics_of(work)
    fidelity, bounds = first["fidelity"], first["fidelity"]["intervals"]["lpips"]
    assert len(fidelity["per_seed"]["lpips"]) == 6
    assert 0 < fidelity["lpips_median"] <= fidelity["lpips_q95"]
    assert bounds["low"] <= fidelity["lpips"] <= bounds["high"]
    assert len(first["protocol"]["lpips_sha256"]) == 64
    assert "LPIPS of the worst 5 %" in (work.folder / RUN / "report.html").read_text()
    work("eval")
    later = metrics_of(work)
    for key in ("lpips", "lpips_q95", "per_seed", "intervals"):
        assert later["fidelity"][key] == fidelity[key]
    assert later["protocol"]["lpips_sha256"] == first["protocol"]["lpips_sha256"]
    assert "LPIPS" in work("compare", str(RUN), str(RUN)).stdout


def test_images_of_prompts_are_scored_by_a_clip_in_a_folder(tmp_path):
    pytest.importorskip("transformers", reason="the extra text is not installed")
    from diffusers_pipelines import stable_diffusion

    work = Qncd(tmp_path)
    stable_diffusion(tmp_path / "model")
    changes = {
        "sampling": {"steps": 2, "prompts": ["a cat", "a red boat"]},
        "calibration": {"trajectories": 2, "batch_size": 2, "noise_trajectories": 2},
        "correction": {"intra": "none", "inter": {"method": "none"}},
    }
    work.write_config(
        tiny_config(tmp_path / "model", quantization__weights__rounding="nearest", **changes)
    )
    for command in (
        ("calibrate", "--config", "tiny.yaml"),
        ("quantize",),
        ("sample", "--num", "4"),
    ):
        work(*command)
    save_clip(tmp_path / "clip")
    said = work("eval", "--clip", "clip").stdout
    metrics = metrics_of(work)
    for name in ("full", "quantized"):
        score = metrics[name]["clip_score"]
        assert 0 < score["low"] <= score["value"] <= score["high"] <= 100
        assert score["network"] == f"clip@{metrics['protocol']['clip_sha256'][:8]}"
    assert metrics["fidelity"]["changes"]["clip_score"]["low"] is not None
    assert "CLIP score (clip@" in said
