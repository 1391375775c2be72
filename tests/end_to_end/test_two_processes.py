"""Two processes in one run at once: one after the other, and both have what they asked for."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest
from processes import started

SET = Path("runs/tiny/samples/new")
SAMPLE = ("sample", "--batch-size", "2", "--name", "new", "--no-compile")


def both(
    folder: Path, first: tuple[str, ...], second: tuple[str, ...], apart: float = 0.0
) -> list[int | None]:
    """Exit codes of two commands that were begun so many seconds apart."""
    processes = [started(folder, *first, streams="first.")]
    time.sleep(apart)
    processes.append(started(folder, *second, streams="second."))
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize(
    ("first", "second", "seeds"),
    [
        (("--num", "4"), ("--num", "6"), range(6)),
        (("--num", "3"), ("--seed", "3", "--num", "3"), range(6)),
        (("--num", "4", "--force"), ("--num", "4", "--force"), range(4)),
    ],
    ids=["more and fewer", "others", "force"],
)
def test_two_that_sample_into_one_set_lose_nothing(sampled, tmp_path, first, second, seeds):
    work = shutil.copytree(sampled, tmp_path / "work")
    assert both(work, (*SAMPLE, *first), (*SAMPLE, *second)) == [0, 0]
    manifest = json.loads((work / SET / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["seeds"] == list(seeds)
    names = {path.name for path in (work / SET).iterdir()}
    assert names == {f"{s:06d}.png" for s in seeds} | {"manifest.json", "latents.safetensors"}
    assert not (work / "runs" / "tiny" / ".lock").exists()


@pytest.mark.slow
def test_two_that_sample_the_same_set_twenty_times_make_the_set_of_one(sampled_shallow, tmp_path):
    """Begun up to a second apart, so that they meet at every point."""
    work = shutil.copytree(sampled_shallow, tmp_path / "work")
    command = (*SAMPLE, "--num", "7")
    assert both(work, command, command) == [0, 0]
    wanted = files_of(work / SET)
    assert len(wanted) == 7 + 2
    draw = random.Random(0)
    for _ in range(20):
        shutil.rmtree(work / SET)
        assert both(work, command, command, draw.uniform(0, 1)) == [0, 0]
        assert files_of(work / SET) == wanted


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
