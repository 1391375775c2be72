"""What reads only JSON, YAML and the headers of tensor files does not wait for torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Qncd, tiny_config

HEAVY = ("torch", "diffusers", "transformers", "safetensors", "numpy", "PIL")
SAMPLE = ["sample", "--num", "6", "--batch-size", "4"]
PROGRAM = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from qncd_cli.cli.main import cli

results = []
for arguments in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli(arguments)
        except SystemExit as end:
            code = end.code
    loaded = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
    results.append([code, out.getvalue(), err.getvalue(), loaded])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def work(sampled, tmp_path_factory, tiny_model) -> Qncd:
    """A run after all four stages, and what a table of runs needs."""
    runner = Qncd(shutil.copytree(sampled, tmp_path_factory.mktemp("torchless") / "work"))
    shutil.copytree(runner.folder / "runs/tiny/samples/quantized", runner.folder / "reference")
    runner("eval", "--reference", "reference")
    runner.write_config(tiny_config(tiny_model, sampling__stepz=3), "wrong.yaml")
    (runner.folder / "empty").mkdir()
    return runner


def results(folder: Path, *commands: list[str]) -> list[list]:
    """[exit code, stdout, stderr, heavy modules that are loaded by then] of each command."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands), json.dumps(HEAVY)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_nothing_heavy_is_loaded_where_nothing_is_computed(work):
    expected = {
        "calibrate --config tiny.yaml": (0, "calibrate: unchanged, skipped"),
        "quantize": (0, "quantize: unchanged, skipped"),
        " ".join(SAMPLE): (0, "sample: unchanged, skipped"),
        "sample --num 2": (0, "sample: unchanged, skipped"),
        "sample --num 6 --steps 3": (4, "sampling.steps: 4 -> 3"),
        "eval --reference reference": (0, "eval: unchanged, skipped"),
        "run --config tiny.yaml --num 6 --batch-size 4 --reference reference": (
            0,
            "eval: unchanged, skipped",
        ),
        "models": (0, "fashion-ldm"),
        "compare runs/tiny": (0, "full precision"),
        "inspect runs/tiny/quantized.safetensors": (0, "sound"),
        "inspect runs/tiny/config.yaml": (None, ""),
        "calibrate --config tiny.yaml --dry-run": (0, "scheduler: ddim"),
        "calibrate --config wrong.yaml": (3, "did you mean sampling.steps"),
        "run --config wrong.yaml": (3, "did you mean sampling.steps"),
        "sample --run-dir elsewhere": (4, "config.yaml: missing"),
        "eval --run-dir elsewhere": (4, "config.yaml: missing"),
    }
    found = results(work.folder, *[line.split() for line in expected])
    for (line, (code, text)), (ended, out, err, loaded) in zip(
        expected.items(), found, strict=True
    ):
        assert loaded == [], line
        assert code in (None, ended), (line, out, err)
        assert text in out + err, (line, out, err)


def test_no_current_run_is_said_at_once(work):
    (result,) = results(work.folder / "empty", ["quantize"])
    assert (result[0], result[3]) == (4, [])
    assert "no current run" in result[2]


def test_a_damaged_artifact_is_found_without_torch(work, tmp_path):
    folder = shutil.copytree(work.folder, tmp_path / "copy")
    path = folder / "runs/tiny/calibration.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (result,) = results(folder, ["quantize"])
    assert (result[0], result[3]) == (4, [])
    assert "damaged, its content does not match its digest" in result[2]
