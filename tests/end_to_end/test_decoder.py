"""The decoder in integers on the command line: what it promises of images, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Qncd, tiny_config
from drawn_sets import images, manifest, refused

RUN = Path("runs/tiny")
SAMPLES = RUN / "samples"
OFF = ("--set", "first_stage.bits=null")


@pytest.fixture(scope="module")
def decoding(tmp_path_factory, tiny_model) -> Path:
    """A folder with a quantized run that has a decoder, and sets with it and without. Copy before
    changing."""
    runner = Qncd(tmp_path_factory.mktemp("decoder"))
    tree = tiny_config(
        tiny_model,
        sampling__steps=3,
        calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 2},
        quantization__weights={"bits": 8, "rounding": "nearest"},
        quantization__activations__observer="minmax",
        correction={"intra": "none", "inter": {"method": "none"}},
    )
    runner.write_config(tree)
    runner("calibrate", "--config", "tiny.yaml")
    runner("quantize")
    runner("sample", "--num", "5", "--name", "before", "--no-compile")
    runner("quantize", "--set", "first_stage.bits=8")
    runner("sample", "--num", "5", "--no-compile")
    return runner.folder


@pytest.fixture
def work(decoding, tmp_path) -> Qncd:
    return Qncd(shutil.copytree(decoding, tmp_path / "work"))


def test_off_changes_no_bit_and_on_changes_images_alone(work):
    samples = work.folder / SAMPLES
    quantized = (work.folder / RUN / "quantized.safetensors").read_bytes()
    work("sample", "--num", "5", "--name", "off", "--no-compile", *OFF)
    assert images(samples / "off") == images(samples / "before")
    assert manifest(samples / "off")["digest"] == manifest(samples / "before")["digest"]
    assert images(samples / "quantized") != images(samples / "before")
    both = [samples / name / "latents.safetensors" for name in ("quantized", "before")]
    assert manifest(samples / "quantized")["latents"] != "" and both[0].exists()
    work("quantize", "--set", "first_stage.bits=null")
    assert (work.folder / RUN / "quantized.safetensors").read_bytes() == quantized


def test_quantize_says_what_it_made_and_skips_it_the_next_time(work):
    again = work("quantize", "--json").data
    assert again["skipped"] and again["first_stage"]["integer_macs_share"] == 1
    (work.folder / RUN / "first_stage.safetensors").unlink()
    assert not work("quantize", "--json").data["skipped"]
    work("sample", "--num", "5", "--no-compile")  # the same decoder came out: the set holds


def test_batches_shards_and_lost_images_change_none(work):
    samples = work.folder / SAMPLES
    work("sample", "--num", "5", "--name", "one", "--batch-size", "1", "--no-compile")
    whole = images(samples / "quantized")
    assert images(samples / "one") == whole
    (samples / "quantized/000003.png").unlink()
    work("sample", "--num", "5", "--no-compile")
    assert images(samples / "quantized") == whole
    for part in ("1/2", "2/2"):
        batch = ("--batch-size", "3", "--no-compile")
        work("sample", "--num", "5", "--name", "all", "--shard", part, *batch)
    work("merge", "--name", "all")
    assert images(samples / "all") == whole


def test_the_identity_of_a_set_holds_the_decoder(work):
    text = refused(work, "sample", "--num", "5", "--no-compile", *OFF)
    assert "other settings (the decoder in integers" in text
    made = manifest(work.folder / SAMPLES / "quantized")
    assert "first_stage" in made["digests"]
    work("sample", "--full-precision", "--num", "2")
    assert "first_stage" not in manifest(work.folder / SAMPLES / "full")["digests"]


def test_eval_tells_what_the_decoder_costs_where_it_was_used(work):
    says = work("eval").stderr
    assert "PSNR in dB to the floating-point decoder over the same latents" in says
    found = json.loads((work.folder / RUN / "metrics.json").read_text())["decoder"]
    assert found["psnr_db"] > 30 and found["num_samples"] == 5
    assert found["psnr_q05_db"] <= found["psnr_median_db"]
    assert "floating-point decoder" not in work("eval", "--name", "before").stderr
    assert work("verify", "--num", "3").exit_code == 0


def test_a_decoder_that_is_not_there_or_another_s_is_refused(work):
    text = refused(work, "sample", "--num", "5", "--name", "t", "--set", "first_stage.tile=64")
    assert "tile: none -> 64" in text
    path = work.folder / RUN / "first_stage.safetensors"
    kept = path.read_bytes()
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert "first_stage" in refused(work, "sample", "--num", "6", "--no-compile")
    path.unlink()
    text = refused(work, "sample", "--num", "6", "--no-compile")
    assert "there is no decoder of first_stage.bits 8" in text and "first_stage.bits=8" in text
    assert "without reuse" not in text
    text = refused(work, "ablate", "--config", "tiny.yaml", "--set", "first_stage.bits=8")
    assert "ablate decodes all rows alike" in text


def test_a_model_of_pixels_and_odd_values_are_one_line(work, tiny_pixel_model):
    tree = tiny_config(tiny_pixel_model, first_stage__bits=8)
    tree["correction"] = {"intra": "none", "inter": {"method": "none"}}
    work.write_config(tree, "pixel.yaml")
    work("calibrate", "--config", "pixel.yaml", "--run-dir", "pixel")
    assert "draws pixels" in refused(work, "quantize", "--run-dir", "pixel")
    for value in ("4", "7", "true"):
        text = refused(work, "quantize", "--set", f"first_stage.bits={value}")
        assert "first_stage.bits" in text
    assert "first_stage.tile" in refused(work, "quantize", "--set", "first_stage.tile=3")
