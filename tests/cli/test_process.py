"""A process of its own: what it prints, what it ends with, when it collects."""

from __future__ import annotations

import gc
import os
import platform
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


TENSORS = """
import ctypes, resource
def command():
    for _ in range(20):  # of 64 MB each
        taken = ctypes.c_void_p(allocate(2**26))
        ctypes.memset(taken, 1, 2**26)
        ctypes.CDLL(None).free(taken)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    sys.exit(0)
allocate = ctypes.CDLL(None).malloc
allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    "told", ["", "MALLOC_MMAP_THRESHOLD_=131072", "GLIBC_TUNABLES=glibc.malloc.mmap_max=1000"]
)
def test_large_tensors_are_made_of_memory_that_the_process_has(monkeypatch, told):
    """Unless the environment says what glibc does."""
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    if told:
        monkeypatch.setenv(*told.split("=", 1))
    faults, pages = int(ended(TENSORS).stdout), 2**26 // os.sysconf("SC_PAGE_SIZE")
    assert faults > 20 * pages if told else faults < 3 * pages


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
