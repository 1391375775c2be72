"""What a command says before it begins: which stages hold, and why others run again."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import Qncd, save_tiny_pipeline

from qncd_cli.store.files import read_json

RUN = "runs/tiny"
NEAREST = ("--set", "quantization.weights.rounding=nearest")
MEASURE = ("--reference", "reference")


@pytest.fixture
def work(sampled, tmp_path) -> Qncd:
    """A copy of the sampled pipeline, with images for reference."""
    runner = Qncd(shutil.copytree(sampled, tmp_path / "work"))
    shutil.copytree(runner.folder / RUN / "samples/quantized", runner.folder / "reference")
    return runner


def snapshot(runner: Qncd) -> dict[str, bytes]:
    root = runner.folder / "runs"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# ---- one stage ----------------------------------------------------------------------------------


def test_a_changed_key_is_told_with_its_old_and_new_value(work):
    result = work("quantize", *NEAREST)
    why = "quantize: again, because quantization.weights.rounding: gptq -> nearest"
    assert result.stderr.splitlines()[0] == why
    assert work("quantize").stderr == ""
    data = work("quantize", "--set", "quantization.weights.bits=8", "--json").data
    assert data["because"] == "quantization.weights.bits: 4 -> 8"
    assert data["keys"] == ["quantization.weights.bits: 4 -> 8"]


def test_other_bits_are_quantized_from_the_same_calibration(work):
    before = (work.folder / RUN / "calibration.safetensors").read_bytes()
    result = work("quantize", "--bits", "w8a6")
    why = "quantization.weights.bits: 4 -> 8; quantization.activations.bits: 8 -> 6"
    assert result.stderr.splitlines()[0] == f"quantize: again, because {why}"
    assert (work.folder / RUN / "calibration.safetensors").read_bytes() == before
    assert "W8A6" in work("inspect", RUN).stdout
    assert "other settings (the quantized model: " in work("sample", ok=False).stderr
    assert work("quantize").stdout.startswith("quantize: unchanged, skipped")


def test_another_correction_measures_the_noise_alone(work):
    run = work.folder / RUN
    quantized, statistics = run / "quantized.safetensors", run / "noise_stats.safetensors"
    before, was = quantized.stat(), statistics.read_bytes()
    result = work("quantize", "--set", "correction.inter.method=stepwise")
    line = (
        "quantize: again, because the noise was measured without what the stepwise correction needs"
    )
    assert line in result.stderr
    after = quantized.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert statistics.read_bytes() != was
    assert work("quantize").stdout.startswith("quantize: unchanged, skipped")
    assert not [*run.glob("partial/*")]
    work("sample", "--num", "2", "--name", "stepwise")
    work("quantize", "--set", "correction.inter.method=runtime")
    work("sample", "--num", "2", "--inter", "stepwise", "--name", "both")  # what was there is kept


def test_bits_that_calibration_depends_on_are_refused_with_what_to_do_again(work):
    work("calibrate", "--config", "tiny.yaml", "--set", "correction.intra=auto")
    work("quantize")
    before = snapshot(work)
    result = work("quantize", "--bits", "w8a8", ok=False)
    assert result.exit_code == 4
    assert result.stderr == (
        f"Error: {RUN}: calibrate: again, because quantization.weights.bits: 4 -> 8 "
        '(repeat "qncd calibrate" with these settings)\n'
    )
    assert snapshot(work) == before
    work(
        "calibrate",
        "--config",
        "tiny.yaml",
        "--set",
        "correction.intra=auto",
        "--bits",
        "w8a8",
        "--run-dir",
        RUN,
    )
    assert "again, because" in work("quantize").stderr
    assert "W8A8" in work("inspect", RUN).stdout


@pytest.mark.parametrize(("bits", "said"), [("4", "expected widths"), ("fp", "quantizes nothing")])
def test_widths_that_quantize_cannot_take_are_one_line(work, bits, said):
    result = work("quantize", "--bits", bits, ok=False)
    assert result.exit_code == 3
    assert f"--bits {bits}: {said}" in result.stderr


def test_several_changed_keys_are_told_in_the_words_of_the_configuration(work):
    changes = {"correction.intra": "smoothquant", "quantization.split_skip_connections": "false"}
    overrides = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    result = work("calibrate", "--config", "tiny.yaml", *overrides)
    why = result.stderr.splitlines()[0]
    assert why.startswith("calibrate: again, because ")
    assert "correction.intra: embedding -> smoothquant" in why
    assert "quantization.split_skip_connections: true -> false" in why
    assert "smoothing_strength" not in why  # it has not changed, it only begins to count


def test_a_change_that_calibrate_took_in_is_told_by_quantize(work):
    """config.yaml has the new value by then: what quantize was made with is noted."""
    assert work("calibrate", "--config", "tiny.yaml", *NEAREST, "--json").data["skipped"] is True
    why = "quantize: again, because quantization.weights.rounding: gptq -> nearest"
    assert work("quantize").stderr.splitlines()[0] == why


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("quantized.safetensors", "quantized.safetensors: missing"),
        ("noise_stats.safetensors", "noise_stats.safetensors: missing"),
        ("coverage.json", "coverage.json is missing"),
    ],
)
def test_a_missing_output_is_told(work, name, said):
    (work.folder / RUN / name).unlink()
    assert f"quantize: again, because {said}" in work("quantize").stderr


def test_a_damaged_output_is_told(work):
    path = work.folder / RUN / "calibration.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    line = work("calibrate", "--config", "tiny.yaml").stderr.splitlines()[0]
    assert line.startswith("calibrate: again, because calibration.safetensors: truncated")


def test_another_model_is_told(work, tmp_path):
    save_tiny_pipeline(tmp_path / "other", seed=1)
    change = ("--set", f"model.source={tmp_path / 'other'}")
    line = work("calibrate", "--config", "tiny.yaml", *change).stderr.splitlines()[0]
    assert "model.source: " in line
    assert "the model's files changed" in line


def test_settings_that_nobody_knows_any_more_are_admitted(work):
    work("calibrate", "--config", "tiny.yaml", *NEAREST)
    (work.folder / RUN / "settings.json").write_text("{")
    line = work("quantize").stderr.splitlines()[0]
    assert line == "quantize: again, because the configuration of quantize was another one"


def test_a_first_run_and_an_unchanged_one_have_nothing_to_explain(qncd):
    for _ in range(2):
        result = qncd("calibrate", "--config", "tiny.yaml")
        assert "again" not in result.stderr
    assert result.stdout.startswith("calibrate: unchanged, skipped")
    assert qncd("calibrate", "--config", "tiny.yaml", "--force", "--json").data["because"] == (
        "--force says so"
    )


# ---- all four -----------------------------------------------------------------------------------


def test_run_says_what_holds_before_it_begins(work):
    (work.folder / RUN / "coverage.json").unlink()
    options = ("--config", "tiny.yaml", "--num", "6", "--batch-size", "4", *MEASURE)
    result = work("run", *options)
    assert result.stderr.splitlines()[:2] == [
        "calibrate: unchanged",
        "quantize: again, because coverage.json is missing",
    ]
    assert "calibrate: unchanged, skipped" in result.stdout
    assert "sample: unchanged, skipped" in result.stdout
    data = work("run", *options, "--json").data
    assert data["stages"]["calibrate"] == {"unchanged": True, "because": None, "keys": []}
    assert data["stages"]["quantize"]["unchanged"] is True


def test_run_refuses_a_set_of_other_settings_before_any_work_and_has_a_way_out(work):
    options = ("run", "--config", "tiny.yaml", *NEAREST, "--num", "2", *MEASURE)
    before = snapshot(work)
    result = work(*options, ok=False)
    assert result.exit_code == 4
    line = result.stderr.splitlines()[-1]
    assert "quantization.weights.rounding: gptq -> nearest" in line
    assert "--force" in line
    assert "--name NAME" in line
    assert snapshot(work) == before
    work(*options, "--name", "nearest")
    after = snapshot(work)
    for name in ("000000.png", "manifest.json"):
        assert after[f"tiny/samples/quantized/{name}"] == before[f"tiny/samples/quantized/{name}"]
    manifest = json.loads(after["tiny/samples/nearest/manifest.json"])
    assert manifest["seeds"] == [0, 1]
    assert "tiny/metrics_nearest.json" in after


def test_sampling_into_a_set_of_other_settings_names_keys_and_values(work):
    result = work("sample", "--num", "6", "--steps", "3", "--inter", "none", ok=False)
    assert result.exit_code == 4
    (line,) = result.stderr.strip().splitlines()
    assert "sampling.steps: 4 -> 3" in line
    assert "correction.inter.method: ptqd -> none" in line
    assert "--name NAME" in line


def test_a_set_of_another_quantization_is_named_so(work):
    work("quantize", *NEAREST)
    (line,) = work("sample", "--num", "6", ok=False).stderr.strip().splitlines()
    assert "the quantized model: " in line


# ---- eval ---------------------------------------------------------------------------------------


def test_an_unchanged_evaluation_is_skipped_and_says_the_same(work):
    first, second = (work("eval", *MEASURE) for _ in range(2))
    assert "eval: done in" in first.stdout.splitlines()[-1]
    assert second.stdout.splitlines()[-1].startswith("eval: unchanged, skipped, ")
    assert second.stdout.splitlines()[:-1] == first.stdout.splitlines()[:-1]
    assert second.stderr.splitlines()[-1:] == first.stderr.splitlines()[-1:]
    before = work("eval", *MEASURE, "--json").data
    stored = read_json(work.folder / RUN / "metrics.json", "qncd eval")
    assert before == {**stored, "run_dir": RUN}


@pytest.mark.parametrize("change", ["the reference", "metrics.json", "report.html", "set"])
def test_whatever_a_number_depends_on_makes_eval_measure_again(work, change):
    work("eval", *MEASURE)
    if change == "the reference":
        path = work.folder / "reference/000001.png"
        shutil.copy(path.with_name("000002.png"), path)
    elif change == "set":
        work("sample", "--num", "8", "--batch-size", "4")
    else:
        (work.folder / RUN / change).unlink()
    assert "eval: done in" in work("eval", *MEASURE).stdout
    assert "eval: unchanged, skipped" in work("eval", *MEASURE).stdout


@pytest.mark.parametrize("place", ["tiny/samples/quantized", "full-precision"])
def test_an_exchanged_image_is_refused_and_made_again_once_it_is_removed(work, place):
    data = work("eval", *MEASURE, "--json").data
    (path,) = (work.folder / "runs" / place).rglob("000001.png")
    shutil.copy(path.with_name("000002.png"), path)
    result = work("eval", *MEASURE, ok=False)
    assert result.exit_code == 4
    assert "1 of 6 images are not those that were drawn (first: 000001.png)" in result.stderr
    path.unlink()
    if "quantized" in place:
        work("sample", "--num", "6", "--batch-size", "4")
    assert work("eval", *MEASURE, "--json").data["fidelity"] == data["fidelity"]


def test_other_wishes_are_measured(work):
    work("eval", *MEASURE)
    assert "eval: done in" in work("eval").stdout
