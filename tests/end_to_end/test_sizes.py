"""Sizes of images of models without prompts, and several sizes in one calibration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import drawn_sets
import pytest
from conftest import Qncd, tiny_config
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from qncd_cli.models.pipelines import ClassConditionalLDMPipeline
from qncd_cli.store import artifacts, partial

RUN = "runs/tiny"
SIDES = {"sampling__height": 18, "sampling__width": 24}
"""Latents of 9 x 12."""
NARROW = ("--set", "sampling.height=24", "--set", "sampling.width=16")


def images(work: Qncd, name: str = "quantized") -> dict[str, bytes]:
    return drawn_sets.images(work.folder / RUN / "samples" / name)


@contextmanager
def counted(stop_at: int | None = None) -> Iterator[list[int]]:
    """Calls of the U-Net, by rows; Ctrl-C during one of them."""
    calls: list[int] = []

    def see(module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, UNet2DConditionModel):
            calls.append(inputs[0].shape[3])
            if len(calls) == stop_at:
                raise KeyboardInterrupt

    handle = register_module_forward_pre_hook(see)
    try:
        yield calls
    finally:
        handle.remove()


# ---- a size of its own --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_size(tmp_path_factory, tiny_model) -> Qncd:
    """A run whose images are 18 x 24, after four stages; plan: what was foreseen."""
    work = Qncd(tmp_path_factory.mktemp("sizes"))
    work.write_config(tiny_config(tiny_model, **SIDES))
    work.plan = work("calibrate", "--config", "tiny.yaml", "--plan", "--json").data
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    work("sample", "--num", "4")
    work("eval")
    return work


def test_four_stages_of_a_class_conditional_model_follow_the_size(of_size):
    run, plan = of_size.folder / RUN, of_size.plan
    coverage = json.loads((run / "coverage.json").read_text())
    assert coverage["macs"] == plan["coverage"]["macs"]
    written = sum((run / f"{n}.safetensors").stat().st_size for n in ("calibration", "smoothing"))
    left = plan["stages"][0]["disk_bytes"] - plan["stages"][0]["partial_bytes"]
    assert left == pytest.approx(written, rel=0.02)
    for kind in ("calibration", "noise_stats"):
        assert artifacts.read(run / f"{kind}.safetensors", kind).body["latent_shape"] == [3, 9, 12]
    stats = artifacts.read(run / "noise_stats.safetensors", "noise_stats")
    assert stats.body["grid"] == [8, 8]
    for path in (run / "samples/quantized").glob("*.png"):
        with Image.open(path) as image:
            assert image.size == (24, 18)
    manifest = json.loads((run / "samples/quantized/manifest.json").read_text())
    assert (manifest["sampling"]["height"], manifest["sampling"]["width"]) == (18, 24)
    assert json.loads((run / "metrics.json").read_text())["fidelity"]["psnr_db"] > 15
    assert (run / "report.html").is_file()


def test_a_set_of_another_size_is_another_set(of_size):
    before = images(of_size)
    refused = of_size("sample", "--num", "4", *NARROW, "--inter", "none", ok=False)
    assert refused.exit_code == 4 and "sampling.height: 18 -> 24" in refused.stderr
    named = ("--num", "2", *NARROW, "--name", "narrow")
    refused = of_size("sample", *named, ok=False)
    assert refused.exit_code == 3
    said = refused.stderr.partition("Error: ")[2].strip()
    assert "the ptqd correction was prepared for images of another size" in said
    assert "(latents of 9 x 12, now 12 x 8)" in said and len(said.splitlines()) == 1
    drawn = of_size("sample", *named, "--inter", "none")
    assert "24 x 16: activation ranges are of other sizes" in drawn.stderr
    assert images(of_size) == before and len(images(of_size, "narrow")) == 2
    own = of_size("sample", "--num", "1", "--full-precision", "--name", "full")
    assert "activation ranges" not in own.stderr


def test_an_exported_folder_says_how_to_draw_that_size(of_size):
    out = of_size.folder / "exported"
    of_size("export", "--to", "diffusers", out)
    assert "height=18, width=24" in (out / "README.md").read_text()
    pipeline = ClassConditionalLDMPipeline.from_pretrained(of_size.folder / "exported")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline([0], height=18, width=24, num_inference_steps=1, output_type="np").images
    assert drawn.shape == (1, 18, 24, 1)


@pytest.mark.parametrize("plan", [(), ("--plan",)])
@pytest.mark.parametrize(
    ("model", "size", "said"),
    [
        ("tiny_model", {"sampling__image_size": 17}, "17 x 17 pixels do not fit"),
        ("tiny_pixel_model", {"sampling__image_size": 32}, "draws images of its own size alone"),
        ("tiny_dit_model", {"calibration__sizes": [[16, 32]]}, "draws images of its own size"),
    ],
)
def test_what_a_model_cannot_draw_is_one_line_planned_or_not(
    qncd, model, size, said, plan, request
):
    qncd.write_config(tiny_config(request.getfixturevalue(model), **size))
    refused = qncd("calibrate", "--config", "tiny.yaml", *plan, ok=False)
    assert refused.exit_code == 5
    told = refused.stderr.partition("Error: ")[2].strip()
    assert said in told and len(told.splitlines()) == 1
    assert not (qncd.folder / RUN / "calibration.safetensors").exists()


def test_a_plan_of_reuse_is_of_one_size(of_size):
    of_size("quantize", "--set", "correction.inter.method=none", "--set", "sampling.reuse=0.9")
    wanted = ("--num", "1", *NARROW, "--name", "reused", "--inter", "none")
    refused = of_size("sample", *wanted, ok=False)
    assert refused.exit_code == 3
    said = refused.stderr.partition("Error: ")[2].strip()
    assert "plan for sampling.reuse was prepared for images of another size" in said
    assert len(said.splitlines()) == 1
    of_size("sample", *wanted, "--set", "sampling.reuse=null")
    with Image.open(of_size.folder / RUN / "samples/reused/000000.png") as image:
        assert image.size == (16, 24)


@pytest.mark.parametrize("stage", ["calibrate", "run"])
def test_sizes_that_sampling_has_already_are_refused_where_they_are_drawn(qncd, tiny_model, stage):
    tree = tiny_config(tiny_model, **SIDES, calibration__sizes=[[18, 24]])
    qncd.write_config(tree)
    for plan in ((), ("--plan",)):
        refused = qncd(stage, "--config", "tiny.yaml", *plan, ok=False)
        assert refused.exit_code == 3
        assert "calibration.sizes: 18 x 24 is sampling's own size (leave it out)" in refused.stderr


# ---- several sizes ------------------------------------------------------------------------------

SEVERAL = {
    "calibration": {"trajectories": 5, "batch_size": 2, "noise_trajectories": 2},
    "calibration__sizes": [[24, 16]],
    "correction__inter__method": "none",
}
"""Batches of 2, 2 and 1: the first and the last are of the model's own 16 x 16."""

ALONE = ("--set", "correction.intra=none", "--set", "quantization.split_skip_connections=false")
"""Nothing is looked at beside the trajectories."""


@pytest.fixture(scope="module")
def several(tmp_path_factory, tiny_model) -> Qncd:
    """A run that is calibrated at two sizes and quantized."""
    work = Qncd(tmp_path_factory.mktemp("several"))
    work.write_config(tiny_config(tiny_model, **SEVERAL))
    with counted() as work.calls:
        work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    return work


def test_batches_take_sizes_in_turn_and_a_killed_calibration_goes_on(
    several, tmp_path, monkeypatch
):
    for name, value in (("EVERY", 0.0), ("LAG", 0.0), ("SHARE", 1e9)):  # all that is done is kept
        monkeypatch.setattr(partial, name, value)
    path = f"{RUN}/calibration.safetensors"
    trajectories = several.calls[-12:]  # four steps of three batches
    assert trajectories == [8] * 12 and len(several.calls) > 12
    kept = artifacts.read(several.folder / path, "calibration")
    assert kept.body["rows"] == 3 * 4 and kept.body["latent_shape"] == [3, 8, 8]
    again = Qncd(tmp_path)
    (tmp_path / "tiny.yaml").write_bytes((several.folder / "tiny.yaml").read_bytes())
    stop = len(several.calls) - 5  # in the second batch, of the other size
    with counted(stop) as before:
        assert again("calibrate", "--config", "tiny.yaml", ok=False).exit_code != 0
    with counted() as after:
        again("calibrate", "--config", "tiny.yaml")
    assert len(before) == stop and len(after) == 6  # the call that was cut, and those after it
    assert (tmp_path / path).read_bytes() == (several.folder / path).read_bytes()


def test_such_a_run_draws_each_of_its_sizes_the_same_every_time(several):
    once = several("sample", "--num", "3", *NARROW, "--name", "once")
    assert "activation ranges" not in once.stderr
    several("sample", "--num", "1", "--batch-size", "1", *NARROW, "--name", "twice")
    several("sample", "--num", "3", "--batch-size", "1", *NARROW, "--name", "twice")
    several("sample", "--num", "3", *NARROW, "--name", "thrice")
    assert images(several, "once") == images(several, "thrice")
    assert images(several, "twice").keys() == images(several, "once").keys()
    several("sample", "--num", "2")
    assert images(several)["000000.png"] != images(several, "once")["000000.png"]
    with Image.open(several.folder / RUN / "samples/once/000000.png") as image:
        assert image.size == (16, 24)


def test_the_plan_counts_each_size(several):
    plans = [
        several("calibrate", "--config", "tiny.yaml", "--plan", "--json", *more).data["stages"][0]
        for more in (
            ALONE,
            (*ALONE, "--set", "calibration.sizes=null"),
            (*ALONE, "--set", "calibration.sizes=null", *NARROW),
        )
    ]
    both, own, other = (plan["macs"] for plan in plans)
    assert both == pytest.approx((3 * own + 2 * other) / 5)
    held = [p["phases"]["trajectories"] - p["phases"]["loading the model"] for p in plans]
    assert held[1] < held[2] == pytest.approx(held[0], rel=0.05)  # what the larger one takes
    path = several.folder / RUN
    files = ("calibration", "smoothing")
    written = sum((path / f"{name}.safetensors").stat().st_size for name in files)
    plan = several("calibrate", "--config", "tiny.yaml", "--plan", "--json").data["stages"][0]
    assert plan["disk_bytes"] - plan["partial_bytes"] == pytest.approx(written, rel=0.02)
