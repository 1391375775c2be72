"""A process of its own: what it prints, what it ends with, when it collects."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from qncd_cli.cli import process


def ended(body: str) -> subprocess.CompletedProcess:
    """A process that runs `command`, which the body defines."""
    start = "import atexit, sys\nfrom qncd_cli.cli.process import run_alone"
    code = f"{start}\n{body}\nrun_alone(command)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("code", [0, 4])
def test_it_ends_with_the_commands_code_and_all_that_was_printed(code):
    result = ended(
        f"def command():\n    print('out')\n    print('err', file=sys.stderr)\n    sys.exit({code})"
    )
    assert (result.returncode, result.stdout, result.stderr) == (code, "out\n", "err\n")


def test_handlers_are_called_and_nothing_is_taken_apart():
    result = ended(
        "class Last:\n"
        "    def __del__(self): print('taken apart')\n"
        "last = Last()\n"
        "def command():\n"
        "    atexit.register(print, 'handler')\n"
        "    sys.exit(0)"
    )
    assert result.stdout == "handler\n"


def test_an_error_that_nobody_expected_keeps_its_traceback():
    result = ended("def command():\n    raise RuntimeError('unforeseen')")
    assert result.returncode == 1
    assert "RuntimeError: unforeseen" in result.stderr


def test_all_objects_are_rarely_looked_through_until_everything_is_imported(monkeypatch):
    usual, seen = gc.get_threshold(), []
    monkeypatch.setattr(process.atexit, "register", lambda *handler: None)
    monkeypatch.setattr(process.logging, "disable", lambda level: None)
    monkeypatch.setattr(process.gc, "freeze", lambda: seen.append("frozen"))
    process.collect_as_usual()  # in a process that is not alone

    def command():
        seen.append(gc.get_threshold())
        process.collect_as_usual()
        seen.append(gc.get_threshold())
        sys.exit(0)

    with pytest.raises(SystemExit):
        process.run_alone(command)
    assert seen == [(*usual[:2], process.RARELY), "frozen", usual]


IMPORTING = """
import signal
from qncd_cli.cli.process import receive_signals
for number in (signal.SIGINT, signal.SIGHUP):  # which a suite in the background ignores
    signal.signal(number, signal.SIG_DFL)
receive_signals()
try:
    import half_imported
except BaseException:  # as libraries do around what is optional
    pass
print("went on")
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_during_an_import_ends_the_process_at_once_in_one_line(tmp_path, name, code):
    body = f"import os, signal\nos.kill(os.getpid(), signal.{name})\n"
    (tmp_path / "half_imported.py").write_text(body)
    result = subprocess.run(
        [sys.executable, "-c", IMPORTING],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{tmp_path}"},
    )
    assert (result.returncode, result.stdout, result.stderr) == (code, "", "Interrupted.\n")


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored():
    program = (
        "import os, signal\nfrom qncd_cli.cli.process import receive_signals\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nreceive_signals()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\nprint('went on')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "went on\n")
