"""The command line as people and scripts meet it: help, exit codes, one line, one JSON object."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import Qncd, tiny_config
from PIL import Image

from qncd_cli import __version__
from qncd_cli.cli.main import cli
from qncd_cli.config.presets import PRESETS
from qncd_cli.config.shipped import shipped_configs
from qncd_cli.store.files import read_json, write_sealed_json

COMMANDS = [
    "ablate",
    "calibrate",
    "quantize",
    "sample",
    "eval",
    "run",
    "compare",
    "inspect",
    "models",
]
HEAVY = ["torch", "diffusers", "pydantic", "yaml", "rich", "numpy", "safetensors", "PIL"]


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd)


def one_line(result) -> str:
    """The only line on stderr, of a command that printed nothing on stdout."""
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert "Traceback" not in line
    return line


def folder_of_images(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(40 * i, 256, (16, 16), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def evaluated(sampled, tmp_path_factory) -> Qncd:
    """A run after all four stages, with a folder of reference images. Do not change."""
    folder = tmp_path_factory.mktemp("evaluated") / "work"
    shutil.copytree(sampled, folder)
    folder_of_images(folder / "reference")
    runner = Qncd(folder)
    runner("eval")
    return runner


# ---- help ---------------------------------------------------------------------------------------


def test_the_commands_are_the_documented_ones():
    assert set(COMMANDS) <= set(cli.commands)


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_help_of_every_command_shows_an_example(command):
    result = CliRunner().invoke(cli, [command, "--help"], prog_name="qncd")
    assert result.exit_code == 0
    assert f"Usage: qncd {command}" in result.stdout
    examples = result.stdout.partition("Example")[2]
    assert re.search(rf"^\s+qncd {command}", examples, re.MULTILINE)
    assert "--json" in result.stdout
    assert "--debug" in result.stdout


def test_help_shows_the_pipeline_and_the_exit_codes():
    result = CliRunner().invoke(cli, ["-h"], prog_name="qncd")
    assert result.exit_code == 0
    for text in ("qncd calibrate --config", "qncd quantize", "qncd sample", "Exit codes:"):
        assert text in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_the_help_name_options_that_exist(command):
    """Every example parses: an unknown option or a missing one would be a usage error."""
    help_text = CliRunner().invoke(cli, [command, "--help"], prog_name="qncd").stdout
    examples = re.findall(r"^\s+qncd (.+)$", help_text.partition("Example")[2], re.MULTILINE)
    for example in examples:
        name, *arguments = example.split()
        cli.commands[name].make_context(name, arguments)


def test_help_is_instant_because_it_imports_nothing_heavy():
    result = python("-X", "importtime", "-m", "qncd_cli", "--help")
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "click" in imported
    assert not imported & set(HEAVY)


def test_help_and_usage_errors_of_commands_import_nothing_heavy():
    code = (
        "import sys\n"
        "from qncd_cli.cli.main import cli\n"
        "for name in cli.commands:\n"
        "    for option in ('--help', '--no-such-option'):\n"
        "        try: cli([name, option])\n"
        "        except SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "[]"


def test_the_installed_command_and_the_module_are_the_same():
    by_module = python("-m", "qncd_cli", "--version")
    script = Path(sys.executable).with_name("qncd")
    by_script = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert by_module.stdout == by_script.stdout == f"qncd, version {__version__}\n"


def test_no_command_shows_the_help_and_is_a_usage_error():
    result = CliRunner().invoke(cli, [], prog_name="qncd")
    assert result.exit_code == 2
    assert result.output.startswith("Usage: qncd")


# ---- exit codes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrat"],
        ["calibrate"],
        ["calibrate", "--config"],
        ["quantize", "--no-such-option"],
        ["quantize", "surplus"],
        ["sample", "--steps", "0"],
        ["sample", "--steps", "1001"],
        ["sample", "--num", "0"],
        ["sample", "--seed", "-1"],
        ["sample", "--inter", "magic"],
        ["sample", "--low-memory", "--compile"],
        ["sample", "--low-memory", "--full-precision"],
        ["sample", "--eta", "2"],
        ["eval", "--network", "resnet"],
        ["compare"],
        ["inspect"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_with_one_line_that_points_to_the_help(qncd, arguments):
    result = qncd(*arguments, ok=False)
    assert result.exit_code == 2
    assert re.match(r"Error: .*--help", one_line(result))


def test_a_mistyped_option_gets_the_nearest_one(qncd):
    assert "--steps" in one_line(qncd("sample", "--step", "5", "--stepz", "5", ok=False))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["calibrate", "--config", "no.yaml"], "no configuration no.yaml"),
        (["calibrate", "--config", "tiny.yaml", "--set", "sampling.stepz=1"], "sampling.steps?"),
        (["calibrate", "--config", "tiny.yaml", "--set", "sampling"], "expected key.path=value"),
        (["run", "--config", "tiny.yaml", "--set", "sampling.eta=7"], "sampling.eta"),
    ],
)
def test_a_wrong_configuration_exits_3_with_one_line(qncd, arguments, text):
    result = qncd(*arguments, ok=False)
    assert result.exit_code == 3
    assert text in one_line(result)


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize"],
        ["sample"],
        ["eval"],
        ["quantize", "--run-dir", "no/such/run"],
        ["compare", "no/such/run"],
        ["inspect", "no.safetensors"],
        ["eval", "--images", "no/such/folder", "--network", "fashion"],
    ],
    ids=" ".join,
)
def test_a_missing_run_or_file_exits_4_with_one_line(qncd, arguments):
    result = qncd(*arguments, ok=False)
    assert result.exit_code == 4
    assert one_line(result).startswith("Error: ")
    assert not (qncd.folder / "runs").exists()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("./missing", "no such folder"),
        ("missing", "no such folder"),
        ("zoo:fashion-ldn", "no packaged model"),
        (".", "no model_index.json"),
        ("tiny.yaml", "is a file"),
    ],
)
def test_a_missing_model_exits_5_with_one_line(qncd, source, text):
    result = qncd("calibrate", "--config", "tiny.yaml", "--set", f"model.source={source}", ok=False)
    assert result.exit_code == 5
    assert text in one_line(result)
    assert not (qncd.folder / "runs").exists()


@pytest.mark.parametrize("device", ["nonsense", "cuda:999", "mps"])
def test_a_device_that_is_not_there_exits_6_with_one_line(qncd, device):
    result = qncd("calibrate", "--config", "tiny.yaml", "--device", device, ok=False)
    assert result.exit_code == 6
    assert device in one_line(result)
    assert not (qncd.folder / "runs").exists()


def test_a_class_out_of_range_exits_5_with_the_range(evaluated):
    result = evaluated("sample", "--classes", "4", "--name", "other", ok=False)
    assert result.exit_code == 5
    assert "it has classes 0 to 3" in result.stderr
    assert not (evaluated.folder / "runs/tiny/samples/other").exists()


def test_debug_shows_the_traceback_above_the_line(tmp_path):
    command = ["-m", "qncd_cli", "quantize"]
    quiet, loud = python(*command, cwd=tmp_path), python(*command, "--debug", cwd=tmp_path)
    assert quiet.returncode == loud.returncode == 4
    assert "Traceback" not in quiet.stderr
    assert len(quiet.stderr.splitlines()) == 1
    assert "Traceback" in loud.stderr
    assert loud.stderr.splitlines()[-1] == quiet.stderr.strip()


# ---- JSON ---------------------------------------------------------------------------------------


def test_every_command_prints_one_json_object_and_nothing_else(evaluated, tmp_path, tiny_model):
    """On what is there already, so that stages are skipped where they can be."""
    measure = ["--reference", "reference"]
    runs = {
        "calibrate": ["--config", "tiny.yaml"],
        "quantize": [],
        "sample": ["--num", "6", "--batch-size", "4"],
        "eval": measure,
        "compare": ["runs/tiny"],
        "inspect": ["runs/tiny/smoothing.safetensors"],
        "models": [],
        "run": ["--config", "tiny.yaml", "--num", "6", "--batch-size", "4", *measure],
        "ablate": ["--config", "tiny.yaml", "--presets", "minmax", "--num", "2", *measure],
    }
    assert set(runs) == set(COMMANDS)
    for command, arguments in runs.items():
        result = evaluated(command, *arguments, "--json")
        assert isinstance(result.data, dict)
        assert result.stdout.count("\n") == 1, command
    dry = evaluated("calibrate", "--config", "tiny.yaml", "--dry-run", "--json").data
    assert dry["config"]["sampling"]["steps"] == 4
    measure += ["--network", "fashion"]
    images = evaluated("eval", "--images", "reference", *measure, "--json").data
    assert set(images) == {"protocol", "images", "checks"}


def test_stage_summaries_say_what_was_done(evaluated):
    data = evaluated("quantize", "--json").data
    assert data["stage"] == "quantize"
    assert data["skipped"] is True
    assert data["run_dir"] == "runs/tiny"
    size = (evaluated.folder / "runs/tiny/quantized.safetensors").stat().st_size
    assert data["artifact_bytes"] == size < data["bytes"]
    assert 0 < data["integer_macs_share"] < 1
    assert "quantize: unchanged, skipped" in evaluated("quantize").stdout


def test_an_error_with_json_is_the_only_object_on_stdout(qncd):
    failed = qncd("quantize", "--json", ok=False)
    said = json.loads(failed.stdout)["error"]
    assert failed.stderr == f"Error: {said['message']} ({said['hint']})\n"


# ---- dry run, models, inspect, compare ----------------------------------------------------------


def test_a_dry_run_prints_the_resolved_configuration_and_writes_nothing(qncd, tiny_model):
    arguments = ["--config", "tiny.yaml", "--set", "sampling.steps=7", "--dry-run"]
    printed = qncd("calibrate", *arguments).stdout
    (qncd.folder / "again.yaml").write_text(printed)
    again = qncd("calibrate", "--config", "again.yaml", "--dry-run").stdout
    assert again == printed
    assert "steps: 7" in printed
    assert not (qncd.folder / "runs").exists()


def test_models_lists_every_shipped_configuration(qncd):
    data = qncd("models", "--json").data
    assert set(data["configs"]) == set(shipped_configs())
    assert data["configs"]["ldm4"]["bits"] == "W4A8"
    table = qncd("models").stdout
    for name in [*shipped_configs(), *PRESETS]:
        assert name in table
    assert set(data["presets"]) == set(PRESETS)


def test_inspect_shows_tensors_and_lineage(evaluated):
    path = "runs/tiny/quantized.safetensors"
    data = evaluated("inspect", path, "--json").data
    smoothing = evaluated("inspect", "runs/tiny/smoothing.safetensors", "--json").data
    assert data["kind"] == "quantized"
    assert data["parents"]["smoothing"] == smoothing["digest"]
    assert data["tensors"]["conv_in.weight"] == {"dtype": "int8", "shape": [16, 27]}
    text = evaluated("inspect", path).stdout
    assert "quantized.safetensors: quantized" in text
    assert "conv_in.weight_scale" in evaluated("inspect", path, "--tensors").stdout
    assert data["digest"][:16] in text


def test_compare_puts_runs_under_full_precision(evaluated, tmp_path):
    work = Qncd(shutil.copytree(evaluated.folder, tmp_path / "work"))
    shutil.copytree(work.folder / "runs/tiny", work.folder / "runs/other")
    data = work("compare", "runs/tiny", "runs/other", "--json").data
    assert [row["name"] for row in data["rows"]] == ["full precision", "tiny", "other"]
    full, tiny, other = data["rows"]
    assert {**tiny, "name": ""} == {**other, "name": ""}
    assert full["bytes"] > tiny["bytes"]
    assert full["sqnr_latents_db"] is None
    assert tiny["sqnr_latents_db"] > 0
    table = work("compare", "runs/tiny", "runs/other").stdout
    assert "full precision" in table
    assert "other" in table


@pytest.mark.parametrize(
    "key", ["num_samples", "seeds", "model", "reference_sha256", "sampling", "network_sha256"]
)
def test_compare_refuses_runs_of_different_protocols(evaluated, tmp_path, key):
    work = Qncd(shutil.copytree(evaluated.folder, tmp_path / "work"))
    other = shutil.copytree(work.folder / "runs/tiny", work.folder / "runs/other")
    metrics = read_json(other / "metrics.json", "qncd eval")
    metrics["protocol"][key] = "changed"
    write_sealed_json(other / "metrics.json", metrics)
    result = work("compare", "runs/tiny", "runs/other", ok=False)
    assert result.exit_code == 4
    assert f"different protocols: {key} " in one_line(result)
    assert "against changed" in one_line(result)


def test_compare_of_a_damaged_metrics_file_is_one_line(evaluated, tmp_path):
    work = Qncd(shutil.copytree(evaluated.folder, tmp_path / "work"))
    for content in ("{}", "{"):
        (work.folder / "runs/tiny/metrics.json").write_text(content)
        result = work("compare", "runs/tiny", ok=False)
        assert result.exit_code == 4
        assert "damaged" in one_line(result)


def test_run_names_the_run_directory_after_the_configuration(qncd, tiny_model):
    qncd.write_config(tiny_config(tiny_model), "named.yaml")
    data = qncd("calibrate", "--config", "named.yaml", "--json").data
    assert data["run_dir"] == "runs/named"
    assert (qncd.folder / "runs/named/config.yaml").is_file()
    assert (qncd.folder / "runs/.current").read_text() == "runs/named\n"


@pytest.mark.parametrize("name", ["../..", ".hidden", "a/b", ""])
def test_a_set_cannot_be_named_out_of_its_run(qncd, name):
    result = qncd("sample", "--name", name, ok=False)
    assert result.exit_code == 2
    assert "--name" in result.stderr


def test_a_damaged_artifact_is_read_where_nobody_wants_it_verified(sampled_shallow, tmp_path):
    work = Qncd(shutil.copytree(sampled_shallow, tmp_path / "work"))
    path = work.folder / "runs/tiny/quantized.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    sample = ("sample", "--num", "1", "--name", "one", "--no-compile")
    refused = work(*sample, ok=False)
    assert refused.exit_code == 4 and "does not match its digest" in refused.stderr
    assert work(*sample, "--no-verify").exit_code == 0
    assert work(*sample, ok=False).exit_code == 4  # of that call alone
