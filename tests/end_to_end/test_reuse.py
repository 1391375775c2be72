"""Reuse across steps on the command line: what it promises of images, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Qncd, tiny_config
from drawn_sets import images, refused

RUN = Path("runs/tiny")
SET = RUN / "samples/quantized"


@pytest.fixture(scope="module")
def planned(tmp_path_factory, tiny_model) -> Path:
    """A folder with a quantized run that has a plan. Copy before changing."""
    runner = Qncd(tmp_path_factory.mktemp("reuse"))
    tree = tiny_config(
        tiny_model,
        sampling__steps=5,
        calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 2},
        quantization__weights={"bits": 8, "rounding": "nearest"},
        quantization__activations__observer="minmax",
        correction={"intra": "none", "inter": {"method": "none"}},
    )
    runner.write_config(tree)
    runner("calibrate", "--config", "tiny.yaml")
    runner("quantize")
    runner("sample", "--num", "5", "--name", "whole", "--no-compile")
    runner("quantize", "--reuse", "0.6")
    return runner.folder


@pytest.fixture
def work(planned, tmp_path) -> Qncd:
    return Qncd(shutil.copytree(planned, tmp_path / "work"))


def test_a_plan_leaves_the_quantized_model_and_images_without_it_as_they_were(work):
    before = (work.folder / RUN / "quantized.safetensors").read_bytes()
    result = work("quantize", "--reuse", "0.7")
    assert "# computed, . kept" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines()[1:])
    assert (work.folder / RUN / "quantized.safetensors").read_bytes() == before
    off = ("--set", "sampling.reuse=null", "--no-compile")
    work("sample", "--num", "5", "--name", "again", *off)
    samples = work.folder / RUN / "samples"
    assert images(samples / "again") == images(samples / "whole")
    manifests = [
        json.loads((samples / n / "manifest.json").read_text()) for n in ("again", "whole")
    ]
    assert manifests[0]["digest"] == manifests[1]["digest"]
    assert "reuse" not in manifests[0]["digests"]


def test_a_plan_is_inspected_as_a_picture(work):
    printed = work("quantize").stdout.splitlines()[1:]
    shown = work("inspect", str(RUN / "reuse.safetensors")).stdout.splitlines()
    assert len(printed) > 3 and printed == [line for line in shown if line in printed]


def test_a_plan_that_holds_is_not_made_again(work):
    plan = work.folder / RUN / "reuse.safetensors"
    before = plan.stat().st_mtime_ns
    assert work("quantize", "--json").data["skipped"]
    assert plan.stat().st_mtime_ns == before
    again = work("quantize", "--reuse", "0.8", "--json").data
    assert not again["skipped"] and again["reuse"]["share"] <= 0.8
    assert plan.stat().st_mtime_ns != before


def test_batch_size_interruption_and_shards_change_no_image(work):
    work("sample", "--num", "5", "--name", "all")
    samples = work.folder / RUN / "samples"
    wanted = images(samples / "all")
    assert wanted.keys() == images(samples / "whole").keys() and wanted != images(samples / "whole")
    work("sample", "--num", "5", "--batch-size", "1", "--name", "single")
    work("sample", "--num", "2", "--name", "grown")
    work("sample", "--num", "5", "--name", "grown")
    for part in ("1/2", "2/2"):
        work("sample", "--num", "5", "--batch-size", "2", "--shard", part, "--name", "sharded")
    work("merge", "--name", "sharded")
    for name in ("single", "grown", "sharded"):
        assert images(samples / name) == wanted, name
    assert "reuse" in json.loads((samples / "all/manifest.json").read_text())["digests"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--steps", "4"), "sampling.steps: 5 -> 4"),
        (("--scheduler", "euler"), "sampling.scheduler: ddim -> euler"),
        (("--guidance", "3"), "sampling.guidance_scale: 2.0 -> 3.0"),
        (("--set", "sampling.reuse=0.5"), "sampling.reuse: 0.6 -> 0.5"),
        (("--set", "correction.reuse=none"), "correction.reuse: both -> none"),
        (("--inter", "runtime"), "correction.inter.method runtime is of sampling without reuse"),
        (("--scheduler", "plms"), "sampling.reuse takes the schedulers ddim"),
    ],
)
def test_what_a_plan_was_not_made_for_is_refused_with_one_line(work, arguments, said):
    before = sorted(work.folder.rglob("*"))
    assert said in refused(work, "sample", "--num", "1", "--name", "x", *arguments)
    pictures = [path for path in work.folder.rglob("*.png") if path not in before]
    assert pictures == []


def test_other_bits_need_a_plan_of_their_own(work):
    work("quantize", "--bits", "w4a8", "--set", "sampling.reuse=null")
    line = refused(work, "sample", "--num", "1", "--set", "sampling.reuse=0.6", "--name", "x")
    assert "quantize is another one than it was made from" in line
    work("quantize", "--set", "sampling.reuse=0.6")
    work("sample", "--num", "1", "--name", "x")


def test_a_run_without_a_plan_says_how_to_make_one(work):
    (work.folder / RUN / "reuse.safetensors").unlink()
    line = refused(work, "sample", "--num", "1", "--name", "x")
    assert "there is no plan for sampling.reuse 0.6" in line and "qncd quantize --reuse" in line


def test_full_precision_knows_nothing_of_reuse_and_eval_compares_with_it(work):
    work("sample", "--num", "3")
    found = work("eval", "--json").data["fidelity"]
    assert 10 < found["psnr_db"] < 100
    manifest = json.loads((work.folder / SET / "manifest.json").read_text())
    assert "reuse" not in manifest["sampling"]


def test_ablate_refuses_reuse(work):
    options = ("--set", "sampling.reuse=0.5", "--set", "correction.inter.method=none")
    line = refused(work, "ablate", "--config", "tiny.yaml", *options)
    assert "ablate draws its rows without reuse" in line
