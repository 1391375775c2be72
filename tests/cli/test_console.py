"""What ends a command: whatever it is, one line and a code that is documented."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qncd_cli.cli import commands
from qncd_cli.cli.main import EPILOG

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
