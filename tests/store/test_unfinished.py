"""Unfinished files: gone when they are finished or their process is, and nothing else goes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qncd_cli.store import files
from qncd_cli.store.unfinished import WRITING, remove_unfinished

KILLED = """
import os, signal, sys
from pathlib import Path
from qncd_cli.store import files
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write_bytes(Path(sys.argv[1]), b"half")
"""


def killed_while_writing(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -9


def test_what_a_killed_process_left_goes_with_the_next_file_beside_it(tmp_path):
    killed_while_writing(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == [WRITING]
    files.write_bytes(tmp_path / "b", b"data")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_what_killed_processes_left_is_found_at_any_depth(tmp_path):
    killed_while_writing(tmp_path / "samples" / "quantized" / "000000.png")
    remove_unfinished(tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file() or p.name == WRITING] == []


def test_files_of_the_user_that_look_like_old_temporaries_stay(tmp_path):
    keep = [".notes.txt.20261126", ".tmpBcUkq1", ".latents.safetensors.zzzzzzzz"]
    for name in keep:
        (tmp_path / name).write_text("mine")
    files.write_bytes(tmp_path / "a", b"data")
    remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*keep, "a"])


def test_what_a_living_process_writes_stays_and_is_finished(tmp_path):
    with files.replacing(tmp_path / "a") as temporary:
        temporary.write_bytes(b"data")
        files.write_bytes(tmp_path / "b", b"beside")
        remove_unfinished(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"data"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(("age", "there"), [(0, True), (2 * 86400, False)])
def test_what_another_machine_left_is_given_up_after_a_day(tmp_path, age, there):
    place = tmp_path / WRITING / "0123456789abcdef-1-0"
    place.parent.mkdir()
    place.write_bytes(b"half")
    os.utime(place, (time.time() - age,) * 2)
    remove_unfinished(tmp_path)
    assert place.exists() == there
