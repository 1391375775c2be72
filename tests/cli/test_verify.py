"""qncd verify: a few seeds of both models, exit code 7 and a line for each image at fault."""

from __future__ import annotations

import shutil

import pytest
from conftest import SHALLOW, Qncd, rewrite_latents, save_tiny_pipeline, tiny_config
from PIL import Image
from safetensors.torch import load_file, save_file

from qncd_cli.store import artifacts

SET = "runs/tiny/samples/quantized"


@pytest.fixture
def work(sampled_shallow, tmp_path) -> Qncd:
    return Qncd(shutil.copytree(sampled_shallow, tmp_path / "work"))


def paint(runner: Qncd, seed: int, colour: int) -> None:
    """The quantized image of a seed in one colour."""
    path = runner.folder / SET / f"{seed:06d}.png"
    with Image.open(path) as image:
        size = image.size
    Image.new("L", size, colour).save(path)


def test_sound_images_pass_and_what_is_there_is_not_drawn_again(work):
    before = {p.name: p.stat().st_mtime_ns for p in (work.folder / SET).iterdir()}
    data = work("verify", "--num", "4", "--json").data
    assert data["ok"] and data["faults"] == [] and data["seeds"] == [0, 1, 2, 3]
    assert set(data["psnr_db"]) == {"0", "1", "2", "3"}
    assert {p.name: p.stat().st_mtime_ns for p in (work.folder / SET).iterdir()} == before
    said = work("verify", "--num", "7", "--batch-size", "4").stdout
    assert "7 seeds, 0 faults, PSNR at least" in said
    assert (work.folder / "runs/tiny/samples/verify/000006.png").is_file()
    work("verify", "--num", "7", "--batch-size", "4", "--name", "quantized")
    assert (work.folder / SET / "000006.png").is_file()


def test_every_image_at_fault_is_a_line_and_the_exit_code_is_7(work):
    paint(work, 1, 0)
    paint(work, 2, 128)
    drawn = artifacts.read(work.folder / SET / "latents.safetensors", "latents")
    latents = drawn.tensors["latents"].clone()
    latents[3, 0, 0] = float("nan")
    rewrite_latents(work.folder / SET, latents=latents)
    failed = work("verify", "--num", "5", ok=False)
    assert failed.exit_code == 7
    assert failed.stdout.splitlines()[:3] == [
        "seed 1, quantized: black: every pixel is 0, 0, 0",
        "seed 2, quantized: constant: every pixel is 128, 128, 128",
        "seed 3, quantized: 8 of its latents are not finite",
    ]
    (line,) = failed.stderr.strip().splitlines()
    assert line.startswith("Error: 3 faults in the images of 5 seeds (seeds 1, 2, 3)")
    again = work("verify", "--num", "4", "--force", "--json").data
    assert again["sets"]["quantized"] == "runs/tiny/samples/verify"
    assert work("verify", "--num", "5", ok=False).exit_code == 7


def test_a_bound_names_the_images_below_it(work):
    least = min(work("verify", "--num", "3", "--json").data["psnr_db"].values())
    work("verify", "--num", "3", "--min-psnr", str(least))
    failed = work("verify", "--num", "3", "--min-psnr", "190", "--json", ok=False)
    assert failed.exit_code == 7
    assert failed.stdout.count("\n") == 1 and '"ok": false' in failed.stdout
    assert failed.stdout.count('"what": "psnr_db"') == 3
    assert "at least 190.0 dB wanted" in failed.stdout


def test_drawing_that_meets_what_is_not_finite_is_a_fault(tmp_path):
    """A decoder that overflows: calibration and quantization never come to it."""
    save_tiny_pipeline(tmp_path / "model", **SHALLOW)
    path = tmp_path / "model" / "vqvae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.weight"].fill_(3e38)
    save_file(tensors, path, metadata={"format": "pt"})
    runner = Qncd(tmp_path)
    few = {"trajectories": 2, "batch_size": 2, "noise_trajectories": 2}
    runner.write_config(tiny_config(tmp_path / "model", calibration=few))
    runner("calibrate", "--config", "tiny.yaml")
    runner("quantize")
    failed = runner("verify", "--num", "2", ok=False)
    assert failed.exit_code == 7
    assert "some seed, quantized: 2 of 2 decoded images are not finite" in failed.stdout


def test_verify_stops_as_sample_does_where_nothing_is_quantized(tmp_path):
    failed = Qncd(tmp_path)("verify", ok=False)
    assert failed.exit_code == 4 and "no current run" in failed.stderr
