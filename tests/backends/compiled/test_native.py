"""The library of operators: compiled once, and a stranger's is never loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qncd_cli.backends.compiled import native
from qncd_cli.store import own_code

SOURCE = """
#include <stdio.h>
__attribute__((constructor)) static void planted(void) { fclose(fopen("%s", "w")); }
"""
COMPILER = shutil.which("gcc") or shutil.which("cc")
LOAD = """
import sys
from pathlib import Path
from qncd_cli.backends.compiled import native
native._compile = lambda: sys.exit("asked to compile")
native.load(Path(sys.argv[1]))
"""


@pytest.fixture
def planted(tmp_path):
    """A library whose constructor writes a file, and that file."""
    if COMPILER is None:
        pytest.skip("no C compiler here")
    trace, library = tmp_path / "it ran", tmp_path / "planted.so"
    (tmp_path / "planted.c").write_text(SOURCE % trace)
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "planted.c")], check=True
    )
    return library, trace


def load_in_a_process(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def another_user(tmp_path, monkeypatch):
    """Whose libraries are not the session's."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.mark.parametrize("disguised", [False, True])
def test_a_planted_library_is_never_loaded(planted, another_user, tmp_path, disguised):
    library, trace = planted
    place, content = native._path(tmp_path), library.read_bytes()
    if disguised:  # with the seal of a stranger
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_DATA_HOME", str(tmp_path / "stranger"))
            own_code.seal(place, content)
    else:
        place.write_bytes(content)
    ended = load_in_a_process(tmp_path)
    assert "asked to compile" in ended.stderr and not trace.exists()


def test_the_same_library_runs_where_the_user_has_sealed_it(planted, another_user, tmp_path):
    """The test above would notice."""
    library, trace = planted
    own_code.seal(native._path(tmp_path), library.read_bytes())
    ended = load_in_a_process(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert trace.exists()


def test_a_library_is_compiled_once_for_all_folders(tmp_path, operators):
    assert own_code.is_sealed(native._path(tmp_path))
    for folder in (tmp_path, tmp_path / "another"):
        ended = load_in_a_process(folder)
        assert ended.returncode == 0, ended.stderr
    assert os.listdir(tmp_path) == []


def test_without_a_folder_of_the_user_s_own_it_lies_beside_the_graphs(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))  # no folder can be made there
    assert native._path(tmp_path).parent == tmp_path


def test_nothing_is_missing_where_the_operators_are_loaded(operators, tmp_path):
    assert not native.missing(tmp_path)
    native.load(tmp_path)
    assert os.listdir(tmp_path) == []
