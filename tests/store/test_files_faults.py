"""A file system that fails at any call: the old file or the new one, in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = shutil.which("gcc") or shutil.which("cc")


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C compiler")
def test_every_writer_outlives_every_fault(tmp_path):
    layer = tmp_path / "faults.so"
    flags = ("-shared", "-fPIC", "-O1", "-o", str(layer), str(HERE / "faults.c"), "-ldl")
    subprocess.run([str(COMPILER), *flags], check=True)
    (tmp_path / "files").mkdir()
    done = subprocess.run(
        [sys.executable, str(HERE / "faults.py"), str(tmp_path / "files")],
        env={**os.environ, "LD_PRELOAD": str(layer)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 200
