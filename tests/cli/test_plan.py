"""--plan: equal to what the stages then write, and a refusal in one line."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers_pipelines
import pytest
from conftest import Qncd, tiny_config

from qncd_cli.forecast import plan as forecast
from qncd_cli.store import partial
from qncd_cli.store.files import read_json
from qncd_cli.store.partial import Partial

RUN = Path("runs/tiny")
PLAN = ("calibrate", "--config", "tiny.yaml", "--plan")


@pytest.fixture(scope="module")
def planned(tmp_path_factory, tiny_model) -> dict:
    runner = Qncd(tmp_path_factory.mktemp("plan"))
    runner.write_config(tiny_config(tiny_model))
    report = runner(*PLAN, "--json").data
    assert [path.name for path in runner.folder.iterdir()] == ["tiny.yaml"]
    return report


def by_stage(report: dict) -> dict[str, dict]:
    return {stage["stage"]: stage for stage in report["stages"]}


def size(path: Path) -> int:
    return path.stat().st_size


def test_the_layers_and_macs_are_those_of_coverage_json(planned, sampled):
    written = read_json(sampled / RUN / "coverage.json", "qncd quantize")
    # a plan sees no numbers: of a file in float32 it cannot know which tensors fit 16 bits
    assert 0 < written.pop("rest_bytes") <= planned["coverage"]["rest_bytes"]
    assert {k: v for k, v in planned["coverage"].items() if k != "rest_bytes"} == written


def test_the_bytes_are_those_of_the_artifacts(planned, sampled):
    written = size(sampled / RUN / "quantized.safetensors")
    rest = planned["coverage"]["rest_bytes"]
    assert planned["result"]["artifact_bytes"] == pytest.approx(written, rel=0.02)
    assert planned["result"]["bytes"] == planned["result"]["artifact_bytes"] + rest
    calibrate, quantize, _ = planned["stages"]
    of_calibrate = [sampled / RUN / f"{n}.safetensors" for n in ("calibration", "smoothing")]
    of_quantize = [sampled / RUN / f"{n}.safetensors" for n in ("quantized", "noise_stats")]
    for stage, files in ((calibrate, of_calibrate), (quantize, of_quantize)):
        left = stage["disk_bytes"] - stage["partial_bytes"]
        assert left == pytest.approx(sum(map(size, files)), rel=0.02)


def test_what_stages_keep_until_they_are_done_takes_at_most_what_was_said(
    qncd, planned, monkeypatch
):
    """With everything written at once."""
    most: dict[str, int] = {}
    write = Partial.write

    def measured(self: Partial, *states: object) -> None:
        write(self, *states)
        here = sum(map(size, self.folder.rglob("*.safetensors")))
        most[self.folder.name] = max(here, most.get(self.folder.name, 0))

    monkeypatch.setattr(Partial, "write", measured)
    monkeypatch.setattr(partial, "EVERY", 0.0)
    monkeypatch.setattr(partial, "SHARE", 1e9)
    qncd("calibrate", "--config", "tiny.yaml")
    qncd("quantize")
    for stage in planned["stages"][:2]:
        headers = 400_000  # a file of its own for every piece, most of a few bytes
        assert 0 < most[stage["stage"]] - headers <= stage["partial_bytes"]


def test_samples_take_at_most_what_was_said(qncd, sampled):
    run = str(sampled / RUN)
    options = ("--num", "6", "--batch-size", "4", "--plan", "--json")
    report = qncd("sample", "--run-dir", run, *options).data
    samples = sampled / RUN / "samples"
    images = [*samples.rglob("*.png")]
    headers = 200 * len(images)  # of PNG: most of images this small
    written = sum(map(size, images)) + size(samples / "quantized" / "latents.safetensors")
    assert (report["samples"], report["batch_size"]) == (6, 4)
    assert written - headers < by_stage(report)["sample"]["disk_bytes"] < 3 * written


def test_quantize_is_planned_from_the_run(qncd, sampled, planned):
    changed = ("--set", "quantization.weights.bits=8")
    report = qncd("quantize", "--run-dir", str(sampled / RUN), "--plan", "--json", *changed).data
    weights = planned["result"]["weight_bytes"]
    assert report["result"]["weight_bytes"] == pytest.approx(2 * weights, rel=0.02)
    assert report["result"]["average_weight_bits"] == 8


def test_bits_of_sensitive_layers_are_told_beside_the_others(qncd, tiny_model):
    """Which layers get them is not known yet: the means without them are said to be so."""
    sensitive = {"weight_bits": 0.5, "activation_bits": 1.0}
    tree = tiny_config(tiny_model, quantization__sensitive=sensitive)
    qncd.write_config(tree, "more.yaml")
    plain, more = (qncd(*PLAN[:2], name, "--plan") for name in ("tiny.yaml", "more.yaml"))
    assert "extra bits" not in plain.stdout
    for text in (
        "before extra bits",
        "extra weight bits, mean over weights",
        "0.50",
        "extra input bits, mean over MACs",
        "at most 1.00",
    ):
        assert text in more.stdout
    result = qncd(*PLAN[:2], "more.yaml", "--plan", "--json").data["result"]
    assert result["extra_weight_bits"] == pytest.approx(0.5, abs=0.01)
    assert result["extra_input_bits"] == 1.0
    budget = qncd(*PLAN, "--set", "quantization.weights.budget=4.5", "--json").data["result"]
    assert budget["average_weight_bits"] == pytest.approx(4.5, abs=0.01)
    assert budget["extra_weight_bits"] != 0
    assert budget["extra_input_bits"] == 0


def test_guidance_doubles_the_rows_where_the_pipeline_guides(qncd, tiny_model, tmp_path):
    """Up to 1 it is off in diffusers' pipelines, at 1 alone in class-conditional ones."""
    text = diffusers_pipelines.save("StableDiffusionPipeline", tmp_path / "text")
    macs = {}
    for name, scale in (("text", 0.0), ("text", 2.0), ("class", 0.5), ("class", 1.0)):
        tree = tiny_config(text if name == "text" else tiny_model)
        tree["sampling"] |= {"guidance_scale": scale}
        tree["sampling"] |= {"prompts": ["a bag"]} if name == "text" else {}
        qncd.write_config(tree)
        report = qncd("run", "--config", "tiny.yaml", "--num", "3", "--plan", "--json").data
        macs[name, scale] = by_stage(report)["sample"]["macs"]
    assert macs["text", 0.0] < macs["text", 2.0]
    assert macs["class", 1.0] < macs["class", 0.5]


# ---- what the stages refuse, a plan refuses -----------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (("run", "--config", "tiny.yaml", "--network", "fashion"), 3, "the packaged classifier"),
        (("run", "--config", "tiny.yaml", "--reference", "zoo"), 3, "the packaged reference"),
        (("run", "--config", "tiny.yaml", "--reference", "gone.npz"), 4, "no such file"),
        (("run", "--config", "tiny.yaml", "--classes", "1,7,207"), 5, "class 7 is out of range"),
        (("calibrate", "--config", "tiny.yaml", "--set", "sampling.classes=[4]"), 5, "class 4"),
    ],
    ids=lambda value: " ".join(value[3:]) if isinstance(value, tuple) else None,
)
def test_a_plan_of_what_would_be_refused_is_refused_alike(qncd, command, code, said):
    lines = {qncd(*command, *plan, ok=False).stderr for plan in (("--plan",), ())}
    (line,) = {text.strip().splitlines()[-1] for text in lines}
    assert said in line
    assert qncd(*command, "--plan", ok=False).exit_code == code


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (("sample", "--set", "quantization.weights.bits=8"), 3, "settled by earlier stages"),
        (("sample", "--classes", "4", "--name", "four"), 5, "class 4 is out of range"),
        (
            ("quantize", "--set", "calibration.trajectories=5"),
            4,
            "calibration.trajectories: 6 -> 5",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_so_is_one_of_a_run_that_is_there(qncd, sampled, command, code, said):
    run = ("--run-dir", str(sampled / RUN))
    for plan in (("--plan",), ()):
        refused = qncd(*command, *run, *plan, ok=False)
        assert (refused.exit_code, said in refused.stderr) == (code, True), refused.stderr


# ---- what a person sees -------------------------------------------------------------------------


def test_the_tables_say_what_is_asked(qncd):
    shown = qncd(*PLAN)
    for text in ("quantized, ", "MACs", "bits of a quantized weight", "result", "peak"):
        assert text in shown.stdout
    for stage in ("calibrate", "quantize", "sample"):
        assert stage in shown.stdout
    assert "Times are rough" in shown.stdout
    assert shown.stderr == ""


def test_what_does_not_fit_in_memory_is_refused_in_one_line(qncd, monkeypatch):
    monkeypatch.setattr(forecast, "available_memory", lambda: 10_000)
    refused = qncd(*PLAN, ok=False)
    assert refused.exit_code == 6
    (line,) = refused.stderr.strip().splitlines()
    assert "of memory" in line
    assert "peak memory" in refused.stdout  # the plan itself is there all the same


def test_what_does_not_fit_on_disk_is_refused_in_one_line(qncd, monkeypatch):
    monkeypatch.setattr(forecast, "available_disk", lambda folder: 10_000)
    refused = qncd(*PLAN, "--json", ok=False)
    assert refused.exit_code == 6
    (line,) = refused.stderr.strip().splitlines()
    assert "of disk" in line
    assert json.loads(refused.stdout)["does_not_fit"]


def test_what_does_not_fit_on_a_gpu_is_refused_in_one_line(qncd, planned, monkeypatch):
    """No GPU is here: its free memory is told, all else is the plan's."""
    _, quantize, _ = planned["stages"]
    assert 0 < quantize["device_bytes"] < quantize["peak_bytes"]
    free = quantize["device_bytes"]
    monkeypatch.setattr(forecast, "device_memory", lambda device: free)
    assert qncd(*PLAN, "--json").data["available"]["device"] == free
    monkeypatch.setattr(forecast, "device_memory", lambda device: free - 1)
    refused = qncd(*PLAN, ok=False)
    assert refused.exit_code == 6
    (line,) = refused.stderr.strip().splitlines()
    assert "quantize takes up to" in line and "free there" in line


def test_a_plan_for_a_device_that_is_not_there_is_refused(qncd):
    refused = qncd(*PLAN, "--device", "cuda:7", ok=False)
    assert refused.exit_code == 6 and "no CUDA device for cuda:7" in refused.stderr


def test_a_stage_is_refused_for_its_own_needs(qncd, planned, monkeypatch):
    """Calibration may fit where drawing many samples at once does not."""
    big = ("run", "--config", "tiny.yaml", "--num", "100000", "--batch-size", "100000", "--plan")
    needed = max(stage["needed_bytes"] for stage in planned["stages"])
    monkeypatch.setattr(forecast, "available_memory", lambda: needed + 1_000_000_000)
    assert qncd(*PLAN).exit_code == 0
    refused = qncd(*big, ok=False)
    assert refused.exit_code == 6
    assert "sample takes about" in refused.stderr


def test_a_model_that_is_not_here_is_refused(qncd):
    config = ("calibrate", "--config", "sdxl_w4a8", "--plan")
    refused = qncd(*config, ok=False)
    assert refused.exit_code == 5
    assert "downloads nothing" in refused.stderr


def test_full_precision_samples_have_no_plan(qncd):
    refused = qncd("sample", "--full-precision", "--plan", ok=False)
    assert refused.exit_code == 2
    assert "--full-precision" in refused.stderr
