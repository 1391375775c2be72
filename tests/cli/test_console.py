"""What ends a command: whatever it is, one line and a code that is documented."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qncd_cli.cli import commands
from qncd_cli.cli.main import EPILOG
from qncd_cli.errors import BackendUnavailable

PROGRAM = (sys.executable, "-m", "qncd_cli")


def test_what_nobody_foresaw_is_one_line_with_its_place(qncd, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise KeyError("weights")

    monkeypatch.setattr(commands, "calibrate_run", fails)
    result = qncd("calibrate", "--config", "tiny.yaml", ok=False)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: KeyError: 'weights', unforeseen, at cli/commands.py:")
    assert " 1 what nobody foresaw" in EPILOG


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [("models",), ("models", "--json"), ("--help",)])
def test_an_output_that_takes_nothing_is_one_line(arguments):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*PROGRAM, *arguments], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 4
    assert done.stderr.decode().splitlines() == ["Error: No space left on device"]


def test_a_closed_output_is_one_line(tmp_path):
    command = f"exec '{sys.executable}' -m qncd_cli models >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE)
    assert done.returncode == 4
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("Error: standard output is closed")


def test_a_reader_that_has_read_enough_is_no_error():
    command = f"'{sys.executable}' -m qncd_cli --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=os.environ)
    assert (done.returncode, done.stderr) == (0, b"")


def test_few_file_handles_are_one_line(qncd):
    program = (
        "import resource, sys\nfrom qncd_cli.__main__ import main\n"
        "import qncd_cli.cli.main\n"
        "sys.argv = ['qncd', 'calibrate', '--config', 'tiny.yaml']\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=qncd.folder, capture_output=True, text=True
    )
    assert done.returncode in (1, 4)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Too many open files" in done.stderr or "unforeseen" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (("sample", "--run-dir", "nowhere"), "ArtifactError", 4),
        (("calibrate", "--config", "tiny.yaml", "--set", "sampling.steps=no"), "ConfigError", 3),
        (("sample", "--num", "-1"), "BadParameter", 2),
        (("sample", "--run-dir", "a" * 5000), "OSError", 4),
    ],
)
def test_with_json_a_failure_is_an_object_on_stdout(qncd, arguments, kind, code):
    failed = qncd(*arguments, "--json", ok=False)
    (error,) = json.loads(failed.stdout).values()
    assert failed.exit_code == error["exit_code"] == code
    assert error["kind"] == kind and error["message"] in failed.stderr
    assert len(failed.stderr.splitlines()) == 1 and len(failed.stderr) < 1000
    plain = qncd(*arguments, ok=False)
    assert plain.stdout == "" and plain.stderr == failed.stderr


def test_what_was_printed_before_a_failure_stays_the_only_object(qncd, monkeypatch):
    def fails(console, *_: object, **__: object) -> None:
        console.result({"a": 1}, print)
        raise BackendUnavailable("cannot be measured")

    monkeypatch.setattr(commands, "calibrate", fails)
    failed = qncd("calibrate", "--config", "tiny.yaml", "--json", ok=False)
    assert failed.exit_code == 6 and json.loads(failed.stdout) == {"a": 1}
