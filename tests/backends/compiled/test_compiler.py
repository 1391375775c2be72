"""Where compilers write."""

from __future__ import annotations

import os
import subprocess
import sys

TWICE = """
import os, sys, tempfile
from pathlib import Path
from qncd_cli.backends.compiled.compiler import CACHE, compiling

before = tempfile.gettempdir()
for name in ("first", "second"):
    with compiling(Path(sys.argv[1]) / name):
        import torch._inductor.codecache as code
        inside = Path(tempfile.gettempdir())
        assert inside.is_relative_to(Path(sys.argv[1])) and os.environ["TMPDIR"] == str(inside)
    assert not inside.exists() and tempfile.gettempdir() == before
    assert Path(code._HEADER_DIR).is_relative_to(os.environ[CACHE]), code._HEADER_DIR
    assert Path(os.environ[CACHE]).is_dir()
"""


def test_headers_outlast_the_compilation_that_first_needed_them(tmp_path):
    """torch keeps their path for the whole process: of the first one of several graphs."""
    unset = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    subprocess.run([sys.executable, "-c", TWICE, str(tmp_path)], check=True, env=unset)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == []
