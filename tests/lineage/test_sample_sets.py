"""Sample sets on disk: what belongs to one, in which order, and what becomes of the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Qncd, save_tiny_pipeline, tiny_config
from PIL import Image
from safetensors.torch import load_file

from qncd_cli.lineage.sample_set import read_set
from qncd_cli.lineage.sample_sets import default_batch

SAMPLES = Path("runs/tiny/samples")
EVAL = ("eval", "--reference", "reference")


@pytest.fixture
def work(sampled, tmp_path) -> Qncd:
    """A copy of the sampled pipeline, six images, with some for reference."""
    runner = Qncd(shutil.copytree(sampled, tmp_path / "work"))
    (runner.folder / "reference").mkdir()
    for path in (runner.folder / SAMPLES / "quantized").glob("*.png"):
        shutil.copy(path, runner.folder / "reference")
    return runner


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


# ---- seeds of more than six digits --------------------------------------------------------------


def test_seeds_that_cross_a_million_are_read_in_their_order(work):
    command = ("sample", "--seed", "999997", "--num", "6", "--batch-size", "2", "--name", "c")
    work(*command)
    folder = work.folder / SAMPLES / "c"
    seeds = list(range(999997, 1000003))
    found = read_set(folder)
    assert found.seeds == seeds == found.latents.seeds
    for image, seed in zip(found.images, seeds, strict=True):
        stored = np.array(Image.open(folder / f"{seed}.png").convert("RGB"))
        assert (image.permute(1, 2, 0).numpy() == stored).all()
    work("sample", "--seed", "1000000", "--num", "1", "--name", "one")
    one = work.folder / SAMPLES / "one" / "1000000.png"
    assert one.read_bytes() == (folder / "1000000.png").read_bytes()


def test_full_precision_of_seeds_that_cross_a_million_is_that_of_the_same_seeds(work):
    """Images in another order than latents would be far from full precision."""
    work("sample", "--full-precision", "--seed", "999997", "--num", "6", "--name", "one")
    work(*EVAL, "--name", "one")
    metrics = json.loads((work.folder / "runs/tiny/metrics_one.json").read_text())
    assert metrics["fidelity"]["psnr_db"] is None  # identical
    assert metrics["fidelity"]["sqnr_latents_db"] is None


# ---- other files in the folder ------------------------------------------------------------------


def test_force_removes_what_the_manifest_names_and_nothing_else(work):
    folder = work.folder / SAMPLES / "quantized"
    mine = ["2026-paper-figure.png", "2026.png", "20261126.png", "0.png", "notes.txt"]
    for name in mine:
        (folder / name).write_text("mine")
    work("sample", "--num", "2", "--classes", "1", "--force")
    left = {p.name for p in folder.iterdir()}
    assert left == {*mine, "000000.png", "000001.png", "latents.safetensors", "manifest.json"}
    assert all((folder / name).read_text() == "mine" for name in mine)


def test_force_removes_the_images_of_a_set_that_was_never_finished(work):
    folder = work.folder / SAMPLES / "quantized"
    tree = manifest(folder)
    unfinished = {**tree, "complete": False, "seeds": [0, 1], "asked": list(range(6))}
    (folder / "manifest.json").write_text(json.dumps(unfinished))
    work("sample", "--num", "2", "--classes", "1", "--force")
    assert sorted(p.name for p in folder.glob("*.png")) == ["000000.png", "000001.png"]


def test_a_set_behind_a_link_stays_behind_it(work):
    """Samples on another disk: neither drawing nor --force puts a folder in the link's place."""
    big = work.folder / "big_disk"
    (work.folder / SAMPLES).rename(big)
    (work.folder / SAMPLES).symlink_to(big)
    (big / "linked").symlink_to("target")
    for options in ((), ("--classes", "1", "--force")):
        work("sample", "--num", "2", "--name", "linked", *options)
        assert (work.folder / SAMPLES).is_symlink()
        assert (big / "linked").is_symlink()
        assert manifest(big / "target")["seeds"] == [0, 1]


# ---- sets that shrink ---------------------------------------------------------------------------


def test_fewer_samples_than_are_there_are_kept_and_measured(work):
    folder = work.folder / SAMPLES / "quantized"
    before = manifest(folder)
    result = work("sample", "--num", "2", "--batch-size", "4")
    assert "6 images are there, 2 asked for: all are kept" in result.stderr
    assert manifest(folder) == before
    assert work(*EVAL, "--json").data["protocol"]["num_samples"] == 6


@pytest.mark.parametrize("lost", [["000001.png"], ["000004.png", "000005.png"], "all"], ids=str)
@pytest.mark.parametrize("num", ["2", "6", "8"])
def test_images_that_were_removed_are_drawn_again(work, lost, num):
    """Those asked for and those beyond; the set is then the one that was never touched."""
    command = ("sample", "--batch-size", "2", "--num")
    work(*command, "6", "--name", "whole")
    folder = shutil.copytree(work.folder / SAMPLES / "whole", work.folder / SAMPLES / "holed")
    names = [p.name for p in folder.glob("*.png")] if lost == "all" else lost
    for name in names:
        (folder / name).unlink()
    work(*command, num, "--name", "holed")
    work(*command, num, "--name", "whole")
    whole = work.folder / SAMPLES / "whole"
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == {
        p.name: p.read_bytes() for p in whole.iterdir() if p.is_file()
    }
    work(*EVAL, "--name", "holed")


# ---- another model ------------------------------------------------------------------------------


def test_weights_exchanged_behind_a_link_make_every_stage_run_again(tmp_path):
    for seed, name in enumerate(("first", "second")):
        save_tiny_pipeline(tmp_path / name, seed=seed)
    model = shutil.copytree(tmp_path / "first", tmp_path / "model")
    shutil.rmtree(model / "unet")
    (model / "unet").symlink_to(tmp_path / "first" / "unet")
    runner = Qncd(tmp_path)
    runner.write_config(tiny_config(model, quantization__weights__rounding="nearest"))
    stages = [("calibrate", "--config", "tiny.yaml"), ("quantize",)]
    for stage in stages:
        runner(*stage)
    (model / "unet").unlink()
    (model / "unet").symlink_to(tmp_path / "second" / "unet")
    for stage in stages:
        assert runner(*stage, "--json").data["skipped"] is False
    stored = load_file(tmp_path / "runs/tiny/quantized.safetensors")["conv_in.bias"]
    found = load_file(tmp_path / "second/unet/diffusion_pytorch_model.safetensors")["conv_in.bias"]
    assert (stored == found).all()


def test_large_models_draw_fewer_samples_together():
    macs = {"fashion-ldm": 200e6, "ldm4": 104e9, "sdxl": 3.4e12}
    assert [default_batch(int(m)) for m in macs.values()] == [50, 9, 1]


def test_a_manifest_without_seeds_is_damaged_and_says_what_makes_another(work):
    folder = work.folder / SAMPLES / "quantized"
    kept = {key: value for key, value in manifest(folder).items() if key != "seeds"}
    (folder / "manifest.json").write_text(json.dumps(kept))
    refused = work("sample", "--num", "6", ok=False)
    assert refused.exit_code == 4
    assert "manifest.json: damaged" in refused.stderr
    assert "qncd sample --force" in refused.stderr
    work("sample", "--num", "6", "--force")
    assert manifest(folder)["seeds"] == [*range(6)]
