"""Damaged, foreign, missing, interrupted: one line, the right code, nothing lost, repeatable."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import Qncd, save_tiny_pipeline, tiny_config
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

RUN = Path("runs/tiny")
SAMPLE = ("sample", "--num", "4", "--batch-size", "2")
EVAL = ("eval", "--reference", "reference")
COMMANDS = {
    "calibrate": ("calibrate", "--config", "tiny.yaml"),
    "quantize": ("quantize",),
    "sample": SAMPLE,
    "eval": EVAL,
}
OUTPUTS = {
    "calibrate": ["tiny/smoothing.safetensors", "tiny/calibration.safetensors", "tiny/config.yaml"],
    "quantize": [f"tiny/{n}" for n in ("quantized.safetensors", "noise_stats.safetensors")]
    + ["tiny/coverage.json"],
    "sample": ["tiny/samples"],
    "eval": [
        "full-precision",
        *(f"tiny/{name}" for name in ("metrics.json", "report.html", "pairs.png")),
    ],
}
STAGES = list(COMMANDS)


def quick_config(model: Path) -> dict:
    """Every stage in well under a second."""
    return tiny_config(
        model,
        sampling__steps=2,
        calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 2},
        quantization__weights__rounding="nearest",
        quantization__activations__observer="minmax",
    )


def whole_pipeline(folder: Path, model: Path) -> Qncd:
    runner = Qncd(folder)
    runner.write_config(quick_config(model))
    (folder / "reference").mkdir()
    for i in range(4):
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(40 * i, 256, (16, 16), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / "reference" / f"{i}.png")
    for command in COMMANDS.values():
        runner(*command)
    return runner


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model) -> Path:
    """A folder after all four stages. Copy before changing."""
    folder = tmp_path_factory.mktemp("done")
    whole_pipeline(folder, tiny_model)
    return folder


@pytest.fixture(scope="module")
def done_with_another_model(tmp_path_factory) -> Path:
    """The same for a model of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("other")
    save_tiny_pipeline(folder / "model", seed=1)
    whole_pipeline(folder, folder / "model")
    return folder


@pytest.fixture
def work(done, tmp_path) -> Qncd:
    """A copy of the finished pipeline to be spoilt."""
    return Qncd(shutil.copytree(done, tmp_path / "work"))


def snapshot(runner: Qncd) -> dict[str, bytes]:
    """Every file below runs/ by name; the hour of a report, and digests of it, left out, and what
    processes say of themselves."""
    root = runner.folder / "runs"
    paths = (p for p in root.rglob("*") if p.is_file() and p.name != "status.json")
    found = {str(p.relative_to(root)): p.read_bytes() for p in paths}
    hour = rb"\d{4}-\d\d-\d\d \d\d:\d\d|\"outputs\": \"\w+\""
    timed = (".html", "settings.json")
    return {n: re.sub(hour, b"", b) if n.endswith(timed) else b for n, b in found.items()}


def one_line(result, code: int) -> str:
    """The only line on stderr, but for the remark about the backend, progress (of a slow machine),
    and why a stage runs again."""
    assert result.exit_code == code, (result.stdout, result.stderr)
    lines = result.stderr.strip().splitlines()
    beside = re.compile(r"backend |(?!Error)[\w ()]+: (\d+ |again, because )")
    (line,) = [line for line in lines if line and not beside.match(line)]
    assert "Traceback" not in line
    return line


def back_to(runner: Qncd, stage: str) -> dict[str, bytes]:
    """Remove what a stage and those after it wrote; returns the files that are left."""
    for later in STAGES[STAGES.index(stage) :]:
        for name in OUTPUTS[later]:
            path = runner.folder / "runs" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return snapshot(runner)


def up_to(runner: Qncd, stage: str) -> dict[str, bytes]:
    """The files that a pipeline has after the given stage."""
    later = [name for s in STAGES[STAGES.index(stage) + 1 :] for name in OUTPUTS[s]]
    return {n: b for n, b in snapshot(runner).items() if not n.startswith(tuple(later))}


# ---- damaged files ------------------------------------------------------------------------------


def missing(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: -len(data) // 3])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def one_byte_changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGES = [missing, truncated, emptied, one_byte_changed]
READ = [
    ("quantize", "smoothing.safetensors"),
    ("quantize", "calibration.safetensors"),
    ("sample", "quantized.safetensors"),
    ("sample", "noise_stats.safetensors"),
    ("eval", "quantized.safetensors"),
    ("eval", "samples/quantized/manifest.json"),
    ("eval", "samples/quantized/latents.safetensors"),
    ("eval", "samples/quantized/000001.png"),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize(("stage", "name"), READ, ids=lambda v: v)
def test_a_stage_refuses_a_damaged_input_in_one_line(work, stage, name, damage):
    damage(work.folder / RUN / name)
    before = snapshot(work)
    line = one_line(work(*COMMANDS[stage], ok=False), 4)
    assert str(RUN / name) in line or "samples/quantized: " in line
    assert "qncd " in line or "make it again" in line
    assert snapshot(work) == before


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("calibrate", "calibration.safetensors"),
        ("calibrate", "smoothing.safetensors"),
        ("quantize", "quantized.safetensors"),
        ("quantize", "noise_stats.safetensors"),
    ],
    ids=lambda v: v,
)
def test_a_stage_makes_its_own_damaged_output_again(work, done, stage, name, damage):
    damage(work.folder / RUN / name)
    work(*COMMANDS[stage])
    assert snapshot(work) == snapshot(Qncd(done))


@pytest.mark.parametrize("damage", [missing, truncated, emptied], ids=lambda d: d.__name__)
def test_quantize_makes_a_damaged_coverage_again_or_says_so(work, damage):
    path = work.folder / RUN / "coverage.json"
    good = path.read_bytes()
    damage(path)
    result = work("quantize", ok=False)
    if result.exit_code != 0:
        assert "qncd quantize --force" in one_line(result, 4)
        work("quantize", "--force")
    assert path.read_bytes() == good


@pytest.mark.parametrize("name", ["latents.safetensors", "000001.png"])
def test_sampling_again_completes_a_set_with_a_missing_file(work, done, name):
    missing(work.folder / RUN / "samples/quantized" / name)
    work(*SAMPLE)
    assert snapshot(work) == snapshot(Qncd(done))


@pytest.mark.parametrize("name", ["latents.safetensors", "manifest.json"])
def test_sampling_into_a_damaged_set_says_so_and_force_makes_it_again(work, done, name):
    truncated(work.folder / RUN / "samples/quantized" / name)
    assert name in one_line(work(*SAMPLE, ok=False), 4)
    work(*SAMPLE, "--force")
    assert snapshot(work) == snapshot(Qncd(done))


@pytest.mark.parametrize("key", ["seeds", "classes", "sampling", "digests", "correction"])
def test_a_manifest_without_one_of_its_keys_is_damaged(work, key):
    path = work.folder / RUN / "samples/quantized/manifest.json"
    path.write_text(path.read_text().replace(f'"{key}"', f'"{key[:-1]}_"', 1))
    assert "manifest.json" in one_line(work(*EVAL, ok=False), 4)


@pytest.mark.parametrize("stage", ["quantize", "sample", "eval"])
def test_a_run_without_its_configuration_says_how_to_make_one(work, stage):
    (work.folder / RUN / "config.yaml").unlink()
    assert "qncd calibrate" in one_line(work(*COMMANDS[stage], ok=False), 4)


@pytest.mark.parametrize("stage", ["quantize", "sample", "eval"])
def test_a_run_with_a_damaged_configuration_names_it(work, stage):
    path = work.folder / RUN / "config.yaml"
    path.write_text(path.read_text().replace("steps:", "stepz:"))
    assert "config.yaml: unknown key sampling.stepz" in one_line(
        work(*COMMANDS[stage], ok=False), 3
    )


# ---- other models, other configurations ---------------------------------------------------------


def point_to(runner: Qncd, model: Path) -> None:
    config = runner.folder / RUN / "config.yaml"
    lines = config.read_text().splitlines()
    changed = [f"  source: {model}" if line.startswith("  source:") else line for line in lines]
    config.write_text("\n".join(changed) + "\n")


@pytest.mark.parametrize("stage", ["quantize", "sample", "eval"])
def test_a_run_whose_model_was_exchanged_is_refused(work, done_with_another_model, stage):
    point_to(work, done_with_another_model / "model")
    before = snapshot(work)
    line = one_line(work(*COMMANDS[stage], ok=False), 4)
    assert re.search("another|the model's files changed", line), line
    assert snapshot(work) == before


def test_a_model_whose_weights_changed_in_place_is_refused(work, tiny_model):
    model = Path(shutil.copytree(tiny_model, work.folder / "model"))
    work.write_config(quick_config(model))
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    one_byte_changed(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert "made from another model" in one_line(work("quantize", ok=False), 4)
    line = one_line(work("sample", "--num", "2", "--name", "new", ok=False), 4)
    assert "made from another model" in line


def test_a_truncated_model_is_a_model_error(work, tiny_model):
    model = Path(shutil.copytree(tiny_model, work.folder / "model"))
    work.write_config(quick_config(model))
    truncated(model / "unet" / "diffusion_pytorch_model.safetensors")
    line = one_line(work("calibrate", "--config", "tiny.yaml", ok=False), 5)
    assert "cannot be loaded" in line


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("quantize", "smoothing.safetensors"),
        ("quantize", "calibration.safetensors"),
        ("sample", "quantized.safetensors"),
        ("sample", "noise_stats.safetensors"),
        ("eval", "quantized.safetensors"),
        ("eval", "samples/quantized"),
    ],
    ids=lambda v: v,
)
def test_an_artifact_of_another_model_is_refused(work, done_with_another_model, stage, name):
    mine, theirs = (folder / RUN / name for folder in (work.folder, done_with_another_model))
    if mine.is_dir():
        shutil.rmtree(mine)
        shutil.copytree(theirs, mine)
    else:
        shutil.copy(theirs, mine)
    before = snapshot(work)
    assert "another" in one_line(work(*COMMANDS[stage], ok=False), 4)
    assert snapshot(work) == before


def test_noise_statistics_of_another_quantization_are_refused(work):
    old = (work.folder / RUN / "noise_stats.safetensors").read_bytes()
    work("quantize", "--set", "quantization.weights.bits=8")
    (work.folder / RUN / "noise_stats.safetensors").write_bytes(old)
    line = one_line(work(*SAMPLE, "--name", "new", ok=False), 4)
    assert "noise_stats.safetensors: made from another quantized artifact" in line


def test_quantize_refuses_a_calibration_made_with_another_configuration(work):
    change = ("--set", "calibration.trajectories=3")
    line = one_line(work("quantize", *change, ok=False), 4)
    assert "calibrate: again, because calibration.trajectories: 2 -> 3" in line


def test_sample_refuses_a_quantized_model_older_than_the_calibration(work):
    work("calibrate", "--config", "tiny.yaml", "--set", "correction.intra=none")
    line = one_line(work(*SAMPLE, "--name", "new", ok=False), 4)
    assert "another configuration" in line
    assert "qncd quantize" in line
    work("quantize")
    work(*SAMPLE, "--name", "new")


def test_eval_refuses_samples_older_than_the_quantized_model(work):
    work("quantize", "--set", "quantization.weights.bits=8")
    assert "another quantized model" in one_line(work(*EVAL, ok=False), 4)
    work(*SAMPLE, "--force")
    work(*EVAL)


def test_sample_does_not_ignore_a_setting_that_it_cannot_follow(work):
    change = ("--set", "quantization.weights.bits=8")
    assert "settled by earlier stages" in one_line(work(*SAMPLE, *change, ok=False), 3)


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--steps", "0"], 2, "--steps"),
        (["--steps", "1001"], 2, "--steps"),
        (["--set", "sampling.steps=0"], 3, "sampling.steps"),
        (["--set", "sampling.steps=1001"], 3, "sampling.steps"),
        (["--classes", "4"], 5, "it has classes 0 to 3"),
        (["--classes", "0,-1"], 5, "it has classes 0 to 3"),
        (["--classes", "shoes"], 3, "--classes shoes"),
        (["--classes", "1,,2"], 3, "--classes 1,,2"),
        (["--set", "sampling.classes=[9]"], 5, "class 9 is out of range"),
        (["--scheduler", "eular"], 3, "sampling.scheduler"),
        (["--scheduler", "euler", "--eta", "0.5"], 3, "eta applies to the ddim scheduler"),
        (["--run-dir", "no/such/run"], 4, "no/such/run"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_sample_refuses_wrong_values_in_one_line_and_writes_nothing(work, arguments, code, text):
    before = snapshot(work)
    assert text in one_line(work(*SAMPLE, "--name", "new", *arguments, ok=False), code)
    assert snapshot(work) == before


def test_calibrate_refuses_classes_out_of_range_before_it_writes(qncd):
    change = ("--set", "sampling.classes=[0, 4]")
    result = qncd("calibrate", "--config", "tiny.yaml", *change, ok=False)
    assert "it has classes 0 to 3" in one_line(result, 5)
    assert not (qncd.folder / "runs").exists()


@pytest.mark.parametrize("option", ["--images", "--reference"])
@pytest.mark.parametrize("content", ["nothing", "no images", "a broken image", "no folder"])
def test_eval_refuses_folders_that_are_no_sets_of_images(work, option, content):
    folder = work.folder / "pictures"
    if content != "no folder":
        folder.mkdir()
    if content == "no images":
        (folder / "notes.txt").write_text("none")
    if content == "a broken image":
        (folder / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    arguments = {"--images": "reference", "--reference": "reference", option: "pictures"}
    command = [part for pair in arguments.items() for part in pair]
    line = one_line(work("eval", "--network", "fashion", *command, ok=False), 4)
    assert "pictures" in line


def test_eval_measures_what_the_manifest_names_and_no_other_images(work, done):
    folder = work.folder / RUN / "samples/quantized"
    for name in ("holiday.png", "20261126.png", "000004.png"):
        shutil.copy(folder / "000000.png", folder / name)
    work(*EVAL)
    measured = [snapshot(runner)["tiny/metrics.json"] for runner in (work, Qncd(done))]
    assert measured[0] == measured[1]


def test_eval_names_the_image_that_is_missing(work):
    missing(work.folder / RUN / "samples/quantized/000002.png")
    line = one_line(work(*EVAL, ok=False), 4)
    assert "3 images, the manifest names 4, without 000002.png" in line


# ---- no room on disk ----------------------------------------------------------------------------


@contextmanager
def full_disk(monkeypatch, at_write: int) -> Iterator[None]:
    """From the given write on, nothing more can be synced."""
    fsync, writes = os.fsync, []

    def sync(handle):
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            writes.append(handle)
        if len(writes) >= at_write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        yield
    assert len(writes) >= at_write, "the stage ended before the disk was full"


def check_unharmed(runner: Qncd, before: dict[str, bytes]) -> None:
    """Earlier files are byte for byte as they were, and no temporaries are left."""
    after = snapshot(runner)
    assert before.items() <= after.items()
    assert [n for n in after if Path(n).name.startswith(".") and n != ".current"] == []


WRITES = [
    ("calibrate", 1),
    ("calibrate", 2),
    ("calibrate", 3),
    ("quantize", 1),
    ("quantize", 2),
    ("quantize", 3),
    ("sample", 1),  # the manifest
    ("sample", 3),  # an image
    ("sample", 7),  # the second part
    ("sample", 8),  # the latents
    ("sample", 10),  # the manifest again
    ("eval", 5),  # a full-precision part
    ("eval", 11),  # metrics.json
    ("eval", 12),  # pairs.png
    ("eval", 13),  # report.html
]


@pytest.mark.parametrize(("stage", "at_write"), WRITES)
def test_a_full_disk_is_one_line_and_the_same_command_completes(
    work, done, monkeypatch, stage, at_write
):
    before = back_to(work, stage)
    with full_disk(monkeypatch, at_write):
        line = one_line(work(*COMMANDS[stage], ok=False), 4)
    assert "no room on disk (free some space and repeat the command)" in line
    check_unharmed(work, before)
    work(*COMMANDS[stage])
    assert snapshot(work) == up_to(Qncd(done), stage)


@pytest.mark.parametrize("at_write", [1, 2, 3])
def test_quantize_that_ends_between_its_files_never_leaves_anothers_coverage(
    work, monkeypatch, at_write
):
    change = ("quantize", "--set", "quantization.weights.bits=8")
    with full_disk(monkeypatch, at_write):
        one_line(work(*change, ok=False), 4)
    work(*change)
    coverage = (work.folder / RUN / "coverage.json").read_bytes()
    work(*change, "--force")
    assert coverage == (work.folder / RUN / "coverage.json").read_bytes()


def test_a_complete_run_is_repeated_where_nothing_can_be_written(work, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    before = snapshot(work)
    with monkeypatch.context() as patch:
        for name in ("replace", "mkdir", "unlink"):
            patch.setattr(os, name, refuse)
        for command in COMMANDS.values():
            work(*command)
    assert snapshot(work) == before


# ---- interruptions ------------------------------------------------------------------------------


@contextmanager
def interrupted_at(call: int) -> Iterator[None]:
    """Ctrl-C while the U-Net is being called for the given time."""
    calls = []

    def interrupt(module, inputs):
        if isinstance(module, UNet2DConditionModel):
            calls.append(None)
            if len(calls) == call:
                raise KeyboardInterrupt

    handle = register_module_forward_pre_hook(interrupt)
    try:
        yield
    finally:
        handle.remove()
    assert len(calls) >= call, "the stage ended before the interruption"


@pytest.mark.parametrize(
    ("stage", "call", "kept"),
    [
        ("calibrate", 1, "nothing of calibrate is kept"),  # smoothing
        ("calibrate", 4, "what calibrate has done is kept"),  # trajectories
        ("quantize", 3, "calibrate is kept, what quantize has done is"),  # noise statistics
        ("sample", 1, "images of finished batches are kept"),  # before the first batch ends
        ("sample", 4, "images of finished batches are kept"),  # in the second batch
        ("eval", 3, "images of finished batches are kept"),  # while drawing full precision
    ],
)
def test_an_interrupted_stage_exits_130_says_what_is_kept_and_the_same_command_completes(
    work, done, stage, call, kept
):
    before = back_to(work, stage)
    with interrupted_at(call):
        line = one_line(work(*COMMANDS[stage], ok=False), 130)
    assert line.startswith(f"Interrupted: {kept}")
    check_unharmed(work, before)
    work(*COMMANDS[stage])
    assert snapshot(work) == up_to(Qncd(done), stage)


@pytest.mark.parametrize("stage", ["calibrate", "quantize"])
def test_interrupting_a_stage_that_is_redone_leaves_its_old_outputs(work, stage):
    before = snapshot(work)
    with interrupted_at(3):
        one_line(work(*COMMANDS[stage], "--force", ok=False), 130)
    partial = f"tiny/partial/{stage}/"
    after = snapshot(work)
    assert {name: data for name, data in after.items() if not name.startswith(partial)} == before


@pytest.mark.parametrize("stage", ["calibrate", "quantize"])
def test_a_stage_clears_away_what_a_killed_process_left_and_nothing_of_the_user(work, done, stage):
    run = work.folder / RUN
    mine = {".notes.txt.20261126": b"mine", ".quantized.safetensors.abcd1234": b"half"}
    for name, data in mine.items():
        (run / name).write_bytes(data)
    (run / ".lock").write_bytes(b"process 1 on a machine that is no more")
    work(*COMMANDS[stage], "--force")
    assert snapshot(work) == snapshot(Qncd(done)) | {f"tiny/{n}": d for n, d in mine.items()}


def test_hooks_are_gone_after_an_interruption(work):
    """The test's own tool: a later test must not be interrupted."""
    back_to(work, "quantize")
    with interrupted_at(1):
        work("quantize", ok=False)
    assert not torch.nn.modules.module._global_forward_pre_hooks
