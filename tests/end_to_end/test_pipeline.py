"""The whole pipeline on a tiny model: repeatable, resumable, and doing what it says it does."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import Qncd, packaged, save_tiny_pipeline, tiny_config
from diffusers import UNet2DConditionModel, VQModel
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from qncd_cli.quant.layers import QuantizedLayer
from qncd_cli.quant.packing import narrowed
from qncd_cli.vocabulary import IDENTICAL_DB

RUN = Path("runs/tiny")
EVAL = ("eval", "--reference", "reference")
ARTIFACTS = ["smoothing", "calibration", "quantized", "noise_stats"]


def quick_config(model: Path, **changes) -> dict:
    return tiny_config(
        model,
        sampling__steps=2,
        calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 2},
        quantization__weights__rounding="nearest",
        quantization__activations__observer="minmax",
        **changes,
    )


def save_images(folder: Path, count: int = 6) -> None:
    folder.mkdir()
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(40 * i, 256, (16, 16), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")


@pytest.fixture
def work(sampled, tmp_path) -> Qncd:
    """A copy of the sampled pipeline, with reference images."""
    runner = Qncd(shutil.copytree(sampled, tmp_path / "work"))
    save_images(runner.folder / "reference")
    return runner


@pytest.fixture(scope="module")
def evaluated(sampled, tmp_path_factory, tiny_model) -> Qncd:
    """A sampled copy, evaluated as a packaged model. Do not change."""
    runner = Qncd(shutil.copytree(sampled, tmp_path_factory.mktemp("evaluated") / "work"))
    save_images(runner.folder / "reference")
    with packaged(tiny_model) as source:
        config = runner.folder / RUN / "config.yaml"
        config.write_text(config.read_text().replace(str(tiny_model), source))
        runner(*EVAL)
    return runner


def files(folder: Path) -> dict[str, bytes]:
    """Every file by its name but status.json, in which processes speak of themselves."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != "status.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def sample_set(runner: Qncd, name: str) -> dict[str, bytes]:
    """Names and bytes of a set's files, hidden ones included."""
    return files(runner.folder / RUN / "samples" / name)


def stored(runner: Qncd, path: str) -> dict[str, Tensor]:
    return load_file(runner.folder / RUN / path)


def latents(runner: Qncd, name: str) -> Tensor:
    return stored(runner, f"samples/{name}/latents.safetensors")["latents"]


def manifest(runner: Qncd, name: str) -> dict:
    return json.loads((runner.folder / RUN / "samples" / name / "manifest.json").read_text())


def pixels(runner: Qncd, name: str) -> Tensor:
    paths = sorted((runner.folder / RUN / "samples" / name).glob("*.png"))
    flat = [torch.frombuffer(bytearray(Image.open(p).tobytes()), dtype=torch.uint8) for p in paths]
    return torch.stack(flat).float()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@contextmanager
def watching(see: Callable[[nn.Module, tuple], None]) -> Iterator[None]:
    """see(module, inputs) runs before every module does."""
    handle = register_module_forward_pre_hook(see)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def interrupted_at(call: int) -> Iterator[None]:
    """Ctrl-C during the given call of the U-Net."""
    calls = []

    def interrupt(module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, UNet2DConditionModel):
            calls.append(None)
            if len(calls) == call:
                raise KeyboardInterrupt

    with watching(interrupt):
        yield
    assert len(calls) == call


# ---- the four commands --------------------------------------------------------------------------


@pytest.mark.usefixtures("one_minute")
def test_four_commands_from_an_empty_folder_are_what_run_does(tmp_path, tiny_model):
    one, four = Qncd(tmp_path / "one"), Qncd(tmp_path / "four")
    for runner in (one, four):
        runner.folder.mkdir()
        runner.write_config(quick_config(tiny_model))
        save_images(runner.folder / "reference")
    four("calibrate", "--config", "tiny.yaml")
    four("quantize")
    four("sample", "--num", "4")
    four(*EVAL)
    one("run", "--config", "tiny.yaml", "--num", "4", *EVAL[1:])
    made = files(four.folder / "runs")
    assert made == files(one.folder / "runs")
    expected = {f"tiny/{kind}.safetensors" for kind in ARTIFACTS}
    expected |= {f"tiny/samples/quantized/00000{i}.png" for i in range(4)}
    expected |= {
        ".current",
        "tiny/config.yaml",
        "tiny/coverage.json",
        "tiny/metrics.json",
        "tiny/pairs.png",
        "tiny/report.html",
        "tiny/settings.json",
        "tiny/samples/quantized/latents.safetensors",
        "tiny/samples/quantized/manifest.json",
        "tiny/samples/quantized_sheet.png",
    }
    assert expected == {name for name in made if not name.startswith("full-precision/")}


def test_the_same_inputs_give_the_same_artifacts_byte_for_byte(sampled, qncd):
    qncd("calibrate", "--config", "tiny.yaml")
    qncd("quantize")
    for name in [*(f"{kind}.safetensors" for kind in ARTIFACTS), "coverage.json", "config.yaml"]:
        again, before = (folder / RUN / name for folder in (qncd.folder, sampled))
        assert again.read_bytes() == before.read_bytes(), name


def test_unchanged_stages_are_skipped_and_force_redoes_them(work):
    before = files(work.folder / "runs")
    for command in (("calibrate", "--config", "tiny.yaml"), ("quantize",)):
        assert work(*command, "--json").data["skipped"] is True
    assert files(work.folder / "runs") == before
    for command in (("calibrate", "--config", "tiny.yaml"), ("quantize",)):
        assert work(*command, "--force", "--json").data["skipped"] is False
    assert files(work.folder / "runs") == before


def test_a_skipped_stage_does_not_call_the_model(work):
    with interrupted_at(0):
        work("calibrate", "--config", "tiny.yaml")
        work("quantize")
        work("sample", "--num", "6", "--batch-size", "4")


def test_a_changed_key_redoes_the_stage_that_uses_it_once(tmp_path, tiny_model):
    work = Qncd(tmp_path)
    work.write_config(quick_config(tiny_model))

    def skipped(*command: str) -> bool:
        return work(*command, "--json").data["skipped"]

    calibrate = ("calibrate", "--config", "tiny.yaml")
    assert [skipped(*calibrate), skipped("quantize")] == [False, False]
    size = (work.folder / RUN / "quantized.safetensors").stat().st_size
    eight_bits = ("--set", "quantization.weights.bits=8")
    assert skipped("quantize", *eight_bits) is False
    assert (work.folder / RUN / "quantized.safetensors").stat().st_size > 1.3 * size
    assert skipped("quantize") is True
    assert skipped(*calibrate, *eight_bits) is True
    unrelated = ("--set", "evaluation.num_samples=9", "--set", "sampling.seed=5")
    assert [skipped(*calibrate, *eight_bits, *unrelated), skipped("quantize")] == [True, True]
    assert skipped(*calibrate, *eight_bits, "--set", "calibration.trajectories=3") is False
    assert skipped("quantize") is False


def test_coverage_accounts_for_every_multiplication(sampled):
    coverage = json.loads((sampled / RUN / "coverage.json").read_text())
    rows = coverage["layers"]
    assert sum(row["macs"] for row in rows) == coverage["macs"]
    integer = sum(row["macs"] for row in rows if row["integer"])
    assert coverage["integer_macs_share"] == pytest.approx(integer / coverage["macs"])
    assert coverage["integer_macs_share"] > 0.9
    assert all(row["why_not_integer"] for row in rows if not row["integer"])
    bits = {row["name"]: (row["weight_bits"], row["activation_bits"]) for row in rows}
    assert bits["conv_in"] == bits["conv_out"] == (8, 16)
    assert bits["mid_block.resnets.0.conv2"] == (4, 8)


# ---- seeds, batches, resumption -----------------------------------------------------------------


def first_inputs(runner: Qncd, *command: str) -> Tensor:
    """The latents [N, C, H, W] with which each batch begins, in order."""
    seen: list[tuple[float, Tensor]] = []

    def see(module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, UNet2DConditionModel):
            seen.append((float(inputs[1].flatten()[0]), inputs[0].clone()))

    with watching(see):
        runner(*command)
    start = max(t for t, _ in seen)
    return torch.cat([x.chunk(2)[0] for t, x in seen if t == start])


def test_batch_size_changes_no_bit_of_the_noise(work):
    alone = first_inputs(work, "sample", "--num", "6", "--batch-size", "1", "--name", "alone")
    together = first_inputs(work, "sample", "--num", "6", "--batch-size", "6", "--name", "together")
    assert torch.equal(alone, together)
    assert not torch.equal(alone[0], alone[1])
    seed_3 = torch.randn((3, 8, 8), generator=torch.Generator().manual_seed(3))
    assert torch.equal(alone[3], seed_3)


def test_batch_size_changes_full_precision_images_by_rounding_only(work):
    for size in ("1", "6"):
        work("sample", "--num", "6", "--batch-size", size, "--full-precision", "--name", f"b{size}")
    assert relative(latents(work, "b1"), latents(work, "b6")) < 1e-4
    assert (pixels(work, "b1") - pixels(work, "b6")).abs().max() <= 1


@pytest.mark.parametrize("inter", ["none", "ptqd", "runtime"])
def test_batch_size_changes_quantized_images_hardly(work, inter):
    """A rounding that falls the other way is worth one code, no more; so is every correction."""
    work("quantize", "--set", f"correction.inter.method={inter}")
    for size in ("1", "6"):
        options = ("--batch-size", size, "--inter", inter, "--name", f"b{size}")
        work("sample", "--num", "6", *options)
    other = latents(work, "b1").roll(1, 0)
    assert relative(latents(work, "b1"), latents(work, "b6")) < 1e-2
    assert relative(other, latents(work, "b6")) > 0.5


def test_low_memory_draws_the_same_set(work):
    """With the same identity: it could even be continued without."""
    work("sample", "--num", "4", "--name", "kept")
    work("sample", "--num", "4", "--name", "packed", "--low-memory")
    assert sample_set(work, "packed") == sample_set(work, "kept")


def test_classes_are_taken_in_turn_by_seed(work):
    work("sample", "--num", "5", "--seed", "7", "--classes", "3,1", "--name", "two")
    found = manifest(work, "two")
    assert found["seeds"] == [7, 8, 9, 10, 11]
    assert found["classes"] == [1, 3, 1, 3, 1]


@pytest.mark.parametrize("call", [1, 6, 16])
def test_an_interrupted_set_completed_is_the_uninterrupted_one(work, call):
    """Four batches of four steps: killed in the first, the second, and the last step of all."""
    command = ("sample", "--num", "8", "--batch-size", "2")
    work(*command, "--name", "whole")
    with interrupted_at(call):
        assert work(*command, "--name", "broken", ok=False).exit_code == 130
    assert manifest(work, "broken")["complete"] is False
    work(*command, "--name", "broken")
    assert sample_set(work, "broken") == sample_set(work, "whole")
    sheets = [work.folder / RUN / f"samples/{n}_sheet.png" for n in ("whole", "broken")]
    assert sheets[0].read_bytes() == sheets[1].read_bytes()


def test_finished_batches_are_not_drawn_again(work):
    command = ("sample", "--num", "8", "--batch-size", "2", "--name", "broken")
    with interrupted_at(10):
        work(*command, ok=False)
    first = work.folder / RUN / "samples/broken/000000.png"
    drawn = first.stat().st_mtime_ns
    assert len(first_inputs(work, *command)) == 4  # of 8: two batches were done
    assert first.stat().st_mtime_ns == drawn


def test_a_killed_process_leaves_a_set_that_can_be_completed(work):
    command = ["sample", "--num", "24", "--batch-size", "2"]
    parts = work.folder / RUN / "samples/killed/.parts"
    process = subprocess.Popen(
        [sys.executable, "-m", "qncd_cli", *command, "--name", "killed"],
        cwd=work.folder,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 500  # a busy machine takes minutes to import torch
    while len(list(parts.glob("*.safetensors"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    work(*command, "--name", "killed")
    work(*command, "--name", "whole")
    assert sample_set(work, "killed") == sample_set(work, "whole")


@pytest.mark.parametrize("batch_size", ["4", "3", "50"])
def test_extending_a_set_equals_drawing_it_at_once(work, batch_size):
    command = ("sample", "--batch-size", batch_size, "--num")
    work(*command, "8", "--name", "at_once")
    work(*command, "4", "--name", "grown")
    work(*command, "8", "--name", "grown")
    assert sample_set(work, "grown") == sample_set(work, "at_once")


# ---- sets and their settings --------------------------------------------------------------------


def test_another_setting_does_not_go_into_the_same_set(work):
    before = sample_set(work, "quantized")
    command = ("sample", "--num", "6", "--batch-size", "4", "--classes", "1")
    result = work(*command, ok=False)
    assert result.exit_code == 4
    assert "sampling.classes: all -> [1]" in result.stderr
    assert "--force" in result.stderr
    assert "--name" in result.stderr
    assert sample_set(work, "quantized") == before
    work(*command, "--name", "ones")
    assert sample_set(work, "quantized") == before
    ones = sample_set(work, "ones")
    assert ones["000000.png"] != before["000000.png"]
    work(*command, "--force")
    assert sample_set(work, "quantized") == ones


def test_force_replaces_a_larger_set_and_leaves_other_files(work):
    folder = work.folder / RUN / "samples/quantized"
    (folder / "notes.txt").write_text("mine")
    work("sample", "--num", "2", "--classes", "1", "--force")
    assert sorted(p.name for p in folder.glob("*.png")) == ["000000.png", "000001.png"]
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("wrong", [["--steps", "3"], ["--classes", "9"]], ids=" ".join)
def test_a_refused_command_with_force_deletes_nothing(work, wrong):
    before = sample_set(work, "quantized")
    assert work("sample", "--num", "6", "--force", *wrong, ok=False).exit_code in (3, 5)
    assert sample_set(work, "quantized") == before


@pytest.mark.parametrize(
    "change",
    [["--steps", "3"], ["--eta", "0.5"], ["--guidance", "1.5"], ["--scheduler", "ddpm"]],
    ids=lambda change: change[0],
)
def test_a_correction_prepared_for_other_sampling_is_refused(work, change):
    command = ("sample", "--num", "2", "--name", "other", *change)
    result = work(*command, ok=False)
    assert result.exit_code == 3
    assert "prepared for other sampling" in result.stderr
    assert not sample_set(work, "other")
    work(*command, "--inter", "none")
    assert manifest(work, "other")["correction"] == {"method": "none"}


def test_a_baseline_measured_for_the_other_target_is_refused(work):
    target = ("--set", "correction.inter.target=injected")
    work("quantize", "--set", "correction.inter.method=runtime")
    result = work("sample", "--num", "2", "--name", "x", *target, ok=False)
    assert result.exit_code == 3
    assert "baseline was measured for target total, not injected" in result.stderr


# ---- corrections --------------------------------------------------------------------------------

RUNTIME = {
    f"runtime {target} {granularity} {baseline}": (
        *("--inter", "runtime", "--set", f"correction.inter.target={target}"),
        *("--set", f"correction.inter.granularity={granularity}"),
        *("--set", f"correction.inter.baseline={baseline}", "--set", "correction.inter.interval=2"),
    )
    for target in ("injected", "total")
    for granularity in ("tensor", "channel")
    for baseline in ("none", "full_precision")
    if (target, baseline) != ("injected", "full_precision")
}
BELIEVED = [name for name in RUNTIME if name.endswith("full_precision")]
"""Here a reading counts only as far as it foretold an error, on this model perhaps not at all."""
CORRECTIONS = {
    "none": ("--inter", "none"),
    "ptqd": ("--inter", "ptqd"),
    "affine": ("--inter", "affine"),
    **RUNTIME,
}


@pytest.fixture(scope="module")
def drawn(sampled, tmp_path_factory) -> Qncd:
    """Sets drawn with every correction: batches A (seeds 0 to 2) and B (3 to 5). Do not change."""
    runner = Qncd(shutil.copytree(sampled, tmp_path_factory.mktemp("drawn") / "work"))
    runner("quantize", "--set", "correction.inter.method=runtime")
    for name, options in CORRECTIONS.items():
        runner("sample", "--num", "6", "--batch-size", "3", "--name", name, *options)
    return runner


@pytest.mark.parametrize("name", CORRECTIONS)
def test_the_correction_of_one_batch_does_not_reach_the_next(drawn, name):
    options = ("--seed", "3", "--num", "3", "--batch-size", "3", "--name", f"{name} alone")
    drawn("sample", *options, *CORRECTIONS[name])
    together, alone = sample_set(drawn, name), sample_set(drawn, f"{name} alone")
    for seed in (3, 4, 5):
        assert alone[f"{seed:06d}.png"] == together[f"{seed:06d}.png"]
    assert torch.equal(latents(drawn, f"{name} alone"), latents(drawn, name)[3:])


@pytest.mark.parametrize("name", [n for n in CORRECTIONS if n not in ("none", *BELIEVED)])
def test_every_correction_changes_the_images(drawn, name):
    assert relative(latents(drawn, name), latents(drawn, "none")) > 1e-4


@pytest.mark.parametrize("name", BELIEVED)
def test_what_is_believed_is_less_than_what_is_read(drawn, name):
    plain, read = latents(drawn, "none"), latents(drawn, name.replace("full_precision", "none"))
    assert relative(latents(drawn, name), plain) < relative(read, plain)


def test_corrections_differ_from_each_other(drawn):
    names = [name for name in CORRECTIONS if name not in BELIEVED]
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            assert relative(latents(drawn, name), latents(drawn, other)) > 1e-5, (name, other)


@pytest.mark.parametrize(("name", "calls"), [("none", 0), ("ptqd", 0), *((n, 2) for n in RUNTIME)])
def test_the_manifest_counts_the_extra_calls_of_a_batch(drawn, name, calls):
    """Estimates follow steps 0 and 2 of four."""
    assert manifest(drawn, name)["extra_calls"] == calls


def test_a_run_time_estimate_acts_from_the_next_step_on(drawn):
    path = "samples/{}/latents.safetensors"
    plain = stored(drawn, path.format("none"))["predictions"]
    for name in RUNTIME:
        predictions = stored(drawn, path.format(name))["predictions"]
        assert torch.equal(predictions[:, 0], plain[:, 0])
        assert name in BELIEVED or not torch.equal(predictions[:, 1], plain[:, 1])


def test_a_set_holds_the_predictions_of_every_step(sampled):
    tensors = load_file(sampled / RUN / "samples/quantized/latents.safetensors")
    assert tensors["predictions"].shape == (6, 4, 3, 8, 8)
    assert tensors["prediction_seeds"].tolist() == [0, 1, 2, 3, 4, 5]


# ---- number formats -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("subject", [(), ("--full-precision",)], ids=["quantized", "full"])
def test_the_denoiser_runs_in_the_configured_number_format(work, dtype, subject):
    seen: dict[str, set] = {"denoiser": set(), "decoder": set()}

    def see(module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, ResnetBlock2D) and module.time_emb_proj is not None:
            seen["denoiser"] |= {inputs[0].dtype, module.norm1.weight.dtype}
        elif isinstance(module, QuantizedLayer):
            seen["denoiser"].add(inputs[0].dtype)
        elif isinstance(module, VQModel | ResnetBlock2D):
            seen["decoder"].add(inputs[0].dtype)

    with watching(see):
        options = ("--name", "x", "--inter", "none", "--set", f"model.dtype={dtype}")
        work("sample", "--num", "2", *options, *subject)
    assert seen["denoiser"] == {getattr(torch, dtype)}
    assert seen["decoder"] == {torch.float32}
    assert manifest(work, "x")["dtype"] == dtype


def test_the_whole_pipeline_runs_in_bfloat16(tmp_path, tiny_model):
    work = Qncd(tmp_path)
    work.write_config(quick_config(tiny_model, model__dtype="bfloat16"))
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    work("sample", "--num", "2")
    work("sample", "--num", "2", "--full-precision")
    assert latents(work, "quantized").isfinite().all()
    assert relative(latents(work, "quantized"), latents(work, "full")) < 1


def test_ranges_per_timestep_group_are_prepared_and_used(tmp_path, tiny_model):
    work = Qncd(tmp_path)
    groups = {"quantization__activations__timestep_groups": 2}
    work.write_config(quick_config(tiny_model, **groups))
    work("calibrate", "--config", "tiny.yaml")
    work("quantize")
    scales = stored(work, "quantized.safetensors")["up_blocks.0.resnets.0.conv1.input_scale"]
    assert scales.shape == (2,)
    assert scales[0] != scales[1]
    seen = set()

    def see(module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, QuantizedLayer):
            seen.add(float(module.input_qparams().scale))

    with watching(see):
        work("sample", "--num", "2")
    assert set(scales.tolist()) <= seen
    few = ("--name", "few")  # with fewer steps than there are groups
    work("sample", "--num", "2", "--steps", "1", "--inter", "none", *few)
    assert work("eval", *few, "--json").data["protocol"]["num_samples"] == 2


def test_attention_products_are_quantized_as_configured(tmp_path, tiny_model):
    work = Qncd(tmp_path)
    work.write_config(quick_config(tiny_model))
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"

    def made(name: str, bits: int) -> tuple[set[str], dict]:
        keys = ("attention.bits", "attention.probabilities_bits")
        options = [o for key in keys for o in ("--set", f"quantization.{key}={bits}")]
        assert work("quantize", *options, "--json").data["skipped"] is False
        work("sample", "--num", "2", "--inter", "none", "--name", name)
        coverage = json.loads((work.folder / RUN / "coverage.json").read_text())
        rows = {row["name"]: row for row in coverage["layers"]}
        return set(stored(work, "quantized.safetensors")), rows[f"{attention}.query_key"]

    calibrate = ("calibrate", "--config", "tiny.yaml")
    work(*calibrate)
    operands = {f"{attention}.{operand}_scale" for operand in ("query", "key", "value")}
    tensors, row = made("eight", 8)
    assert operands <= tensors
    assert (row["weight_bits"], row["activation_bits"], row["integer"]) == (8, 8, True)
    tensors, row = made("float", 32)
    assert not operands & tensors
    assert (row["weight_bits"], row["integer"], row["why_not_integer"]) == (32, False, "configured")
    assert work(*calibrate, "--json").data["skipped"] is True
    assert 0 < relative(latents(work, "eight"), latents(work, "float")) < 0.1


# ---- folding ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    """The tiny model with channels of very different width after norm2, so that smoothing acts."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    save_tiny_pipeline(folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for name in weights:
        if name.endswith("norm2.weight") and "resnets" in name:
            weights[name] = torch.linspace(0.5, 4, len(weights[name]))
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def prepared(folder: Path, model: Path, **changes) -> Qncd:
    runner = Qncd(folder)
    runner.write_config(quick_config(model, correction__inter__method="none", **changes))
    runner("calibrate", "--config", "tiny.yaml")
    runner("quantize")
    return runner


@pytest.mark.parametrize(
    ("intra", "split", "count"),
    [("none", False, 0), ("none", True, 8), ("embedding", True, 16), ("range", False, 73)],
)
def test_without_rounding_folded_smoothing_is_invisible(tmp_path, wide_model, intra, split, count):
    work = prepared(
        tmp_path,
        wide_model,
        correction__intra=intra,
        quantization__split_skip_connections=split,
        quantization__weights__bits=32,
        quantization__activations__bits=32,
        quantization__attention={"bits": 32, "probabilities_bits": 32},
    )
    tensors = stored(work, "smoothing.safetensors")
    factors = {n: f for n, f in tensors.items() if n.endswith(".smoothing")}
    assert len(factors) == count
    assert (len(tensors) > count) == (intra == "range")  # which shifts pointwise layers
    if intra != "none":
        assert max(float(f.max() / f.min()) for f in factors.values()) > 3
    work("sample", "--num", "4")
    work("sample", "--num", "4", "--full-precision")
    assert relative(latents(work, "quantized"), latents(work, "full")) < 1e-5


@pytest.fixture(scope="module", params=["embedding", "smoothquant", "range", "auto"])
def smoothed(request, tmp_path_factory, wide_model) -> Qncd:
    folder = tmp_path_factory.mktemp(f"smoothed-{request.param}")
    return prepared(folder, wide_model, correction__intra=request.param)


def dequantized(tensors: dict[str, Tensor], layer: str, shape: torch.Size) -> Tensor:
    """(q - zero_point) * scale of a 4-bit weight, unpacked by hand: low nibble first."""
    packed = tensors[f"{layer}.weight"].int()
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, : shape[1:].numel()]
    scale, zero_point = tensors[f"{layer}.weight_scale"], tensors[f"{layer}.weight_zero_point"]
    return ((codes - zero_point.int()[:, None]) * scale[:, None]).reshape(shape)


def test_smoothing_is_folded_into_the_stored_weights(smoothed, wide_model):
    original = load_file(wide_model / "unet" / "diffusion_pytorch_model.safetensors")
    tensors = stored(smoothed, "quantized.safetensors")
    layers = [n.removesuffix(".smoothing") for n in tensors if n.endswith(".smoothing")]
    spreads = []
    for layer in layers:
        if tensors[f"{layer}.weight"].dtype != torch.uint8:
            continue  # the outer layers have 8 bits
        weight, factor = original[f"{layer}.weight"], tensors[f"{layer}.smoothing"]
        folded = weight * factor.reshape(1, -1, *[1] * (weight.ndim - 2))
        restored = dequantized(tensors, layer, weight.shape)
        error = relative(restored, folded)
        assert error < 0.25
        spreads.append(float(factor.max() / factor.min()))
        if spreads[-1] > 3:
            assert relative(restored, weight) > 2 * error
        if f"{layer}.shift" in tensors:
            bias = original.get(f"{layer}.bias", torch.zeros(()))
            expected = bias + weight.flatten(1) @ tensors[f"{layer}.shift"]
            assert torch.allclose(tensors[f"{layer}.bias"], expected, atol=1e-5)
    assert len(spreads) >= 8
    assert max(spreads) > 3


def test_stored_factors_are_those_of_the_smoothing_artifact(smoothed):
    factors = stored(smoothed, "smoothing.safetensors")
    tensors = stored(smoothed, "quantized.safetensors")
    assert {n for n in tensors if n.endswith((".smoothing", ".shift"))} == set(factors)
    for name, factor in factors.items():
        assert torch.equal(tensors[name], factor)


def test_smoothed_quantized_images_stay_near_full_precision(smoothed):
    """Without the fold, or without the division, the prediction would be of another model."""
    smoothed("sample", "--num", "4")
    smoothed("sample", "--num", "4", "--full-precision")
    assert relative(latents(smoothed, "quantized"), latents(smoothed, "full")) < 0.3


# ---- evaluation ---------------------------------------------------------------------------------


def test_metrics_have_the_contracts_keys(evaluated):
    metrics = json.loads((evaluated.folder / RUN / "metrics.json").read_text())
    assert metrics.keys() >= {"protocol", "full", "quantized", "fidelity", "bytes"}
    for name in ("full", "quantized"):
        entry = metrics[name]
        assert {"fid", "sfid", "inception_score", "kid", "precision", "recall"} <= set(entry)
        assert {"network", "value", "low", "high"} <= set(entry["feature_distance"])
        assert entry["feature_distance"]["network"] == "fashion-classifier"
        assert entry["feature_distance"]["value"] > 0
        assert entry["fid"] is None
        assert 0 <= entry["class_agreement"] <= 1
    fidelity = metrics["fidelity"]
    assert {"psnr_db", "sqnr_latents_db", "sqnr_steps_db", "feature_distance"} <= set(fidelity)
    assert len(fidelity["sqnr_steps_db"]) == 4
    assert metrics["protocol"]["num_samples"] == 6
    assert metrics["protocol"]["reference"] == "reference"


def test_sizes_and_fidelity_are_those_of_the_files(evaluated, tiny_model):
    metrics = json.loads((evaluated.folder / RUN / "metrics.json").read_text())
    quantized = evaluated.folder / RUN / "quantized.safetensors"
    unet = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    layers = json.loads((evaluated.folder / RUN / "coverage.json").read_text())["layers"]
    integer = {row["name"] for row in layers if row["integer"]}
    rest = sum(narrowed(w).nbytes for n, w in unet.items() if n.rpartition(".")[0] not in integer)
    assert metrics["bytes"] == {
        "full": 4 * sum(w.numel() for w in unet.values()),
        "quantized": quantized.stat().st_size + rest,
        "artifact": quantized.stat().st_size,
        "rest": rest,
    }
    (full_latents,) = (evaluated.folder / "runs/full-precision").rglob("latents.safetensors")
    full = load_file(full_latents)["latents"].double()
    noise = latents(evaluated, "quantized").double() - full
    sqnr = 10 * math.log10(float(full.square().sum() / noise.square().sum()))
    assert metrics["fidelity"]["sqnr_latents_db"] == pytest.approx(sqnr, rel=1e-6)


def test_the_report_needs_nothing_beside_it(evaluated):
    html = (evaluated.folder / RUN / "report.html").read_text()
    assert "data:image/png;base64," in html
    markup = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]+)""", markup)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    fetched = re.findall(r"https?://[^\s\"'<]+", html)
    assert all(url.startswith("http://www.w3.org/") for url in fetched)
    assert "<script src" not in html


def test_full_precision_is_drawn_once_and_shared_by_runs(work):
    def drawn() -> dict[str, int]:
        root = work.folder / "runs/full-precision"
        return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*.png")}

    work(*EVAL)
    first = drawn()
    assert len([name for name in first if re.search(r"/\d{6}\.png$", name)]) == 6
    shutil.copytree(work.folder / RUN, work.folder / "runs/other")
    with interrupted_at(0):  # no call of the U-Net
        work(*EVAL)
        work(*EVAL, "--run-dir", "runs/other")
    assert {n: t for n, t in drawn().items() if "sheet" not in n} == {
        n: t for n, t in first.items() if "sheet" not in n
    }


def test_full_precision_samples_of_the_run_itself_are_used(work):
    work("sample", "--full-precision", "--num", "6", "--batch-size", "4")
    with interrupted_at(0):
        work(*EVAL)
    assert not (work.folder / "runs/full-precision").exists()


def test_a_named_set_gets_its_own_files(work):
    work("sample", "--num", "4", "--inter", "none", "--name", "plain")
    work(*EVAL, "--name", "plain")
    assert (work.folder / RUN / "metrics_plain.json").is_file()
    assert (work.folder / RUN / "report_plain.html").is_file()
    assert not (work.folder / RUN / "metrics.json").exists()


def test_sets_without_any_difference_are_reported_as_identical(work):
    """Both sets of full precision: infinite ratios are null in JSON."""
    work("sample", "--full-precision", "--num", "6", "--batch-size", "4")
    data = work(*EVAL, "--name", "full", "--json").data
    assert data["fidelity"]["sqnr_latents_db"] is None
    assert data["fidelity"]["psnr_db"] is None
    assert data["fidelity"]["psnr_q05_db"] == data["fidelity"]["sqnr_median_db"] == IDENTICAL_DB
    assert data["fidelity"]["changed"] == 0
    json.loads((work.folder / RUN / "metrics_full.json").read_text())


def test_images_from_elsewhere_are_measured_alone(work):
    save_images(work.folder / "mine", 5)
    data = work(*EVAL, "--network", "fashion", "--images", "mine", "--json").data
    assert data["protocol"]["num_samples"] == 5
    assert data["images"]["feature_distance"]["value"] >= 0
