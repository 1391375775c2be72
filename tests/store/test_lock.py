"""The lock of a folder: one process at a time, a dead one's is free, nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qncd_cli.store import lock
from qncd_cli.store.lock import LOCK, locked, locked_if_free

HOLDER = """
import sys, time
from pathlib import Path
from qncd_cli.store.lock import locked
with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder_of(folder: Path) -> subprocess.Popen:
    """A process that holds the lock until it reads a line or dies."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_says_who_holds_the_lock_and_waits(tmp_path):
    holder, said = holder_of(tmp_path), []

    def tell(line: str) -> None:
        said.append((line, holder.poll()))
        threading.Timer(0.05, holder.communicate, ["end\n"]).start()

    with locked(tmp_path, tell):
        assert holder.wait() == 0
    ((line, was_there),) = said
    assert f"{tmp_path}: in use by process {holder.pid} on " in line
    assert "waiting until it has ended" in line
    assert was_there is None
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_holds_nothing(tmp_path):
    holder = holder_of(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / LOCK).is_file()
    with locked(tmp_path, pytest.fail):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert list(tmp_path.iterdir()) == []


def test_whoever_does_not_want_to_wait_is_told(tmp_path):
    holder = holder_of(tmp_path)
    with locked_if_free(tmp_path) as free:
        assert not free
    holder.communicate("end\n")
    with locked_if_free(tmp_path) as free:
        assert free


def test_many_that_take_turns_are_never_two(tmp_path):
    inside, most = [], []

    def turn() -> None:
        for _ in range(20):
            with locked(tmp_path, lambda line: None):
                inside.append(None)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=turn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 80
    assert max(most) == 1


def test_a_folder_that_was_made_for_the_lock_goes_with_it_unless_it_is_used(tmp_path):
    with locked(tmp_path / "runs" / "a", pytest.fail):
        assert (tmp_path / "runs" / "a").is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "runs" / "a", pytest.fail):
        (tmp_path / "runs" / "a" / "b").write_text("")
    assert (tmp_path / "runs" / "a" / "b").is_file()


def test_where_the_system_has_no_locks_work_is_done_without(tmp_path, monkeypatch):
    def unsupported(handle: int, how: int) -> None:
        raise OSError(lock.errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with locked(tmp_path, pytest.fail):
        pass
