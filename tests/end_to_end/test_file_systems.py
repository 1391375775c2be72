"""Real file systems, a full one and one that cannot be written; skipped where none is mounted."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Qncd

pytestmark = pytest.mark.slow
RUNS = Path("runs")
STAGES = {
    "calibrate": ("calibrate", "--config", "tiny.yaml"),
    "quantize": ("quantize",),
    "sample": ("sample", "--num", "6", "--batch-size", "4", "--no-compile"),
    "eval": ("eval",),
}
PAGE = 4096
"""Bytes in which a tmpfs counts."""


def mounted(place: Path, *options: str) -> None:
    found = subprocess.run(["mount", *options, str(place)], capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {found.stderr.strip()}")


@pytest.fixture
def small(tmp_path) -> Iterator[Path]:
    """A folder on a file system of 32 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted(place, "-t", "tmpfs", "-o", "size=32m", "tmpfs")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # tensors may be mapped


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything below it; status.json has times of day in it."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.name != "status.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def room(folder: Path) -> int:
    """Bytes that are free."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def fill(folder: Path, left: int) -> Path:
    """A file that leaves so many bytes of room."""
    path = folder / "filler"
    path.touch()
    path.write_bytes(bytes(room(folder) - max(0, left)))
    return path


def beginning(sampled: Path, folder: Path, stage: str) -> Qncd:
    """A folder in which all stages before this one have run."""
    shutil.copytree(sampled, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / RUNS)
    work = Qncd(folder)
    for name in STAGES:
        if name == stage:
            return work
        work(*STAGES[name])
    raise AssertionError(stage)


@pytest.mark.usefixtures("one_minute")
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_on_a_full_disk_is_one_line_and_completes_once_there_is_room(
    sampled_shallow, tmp_path, small, stage
):
    undisturbed = beginning(sampled_shallow, tmp_path / "undisturbed", stage)
    work = beginning(sampled_shallow, small, stage)
    before = files_of(small)
    undisturbed(*STAGES[stage])
    wanted = files_of(undisturbed.folder)
    new = [len(data) for name, data in wanted.items() if before.get(name) != data]
    needed, at_first = sum(-(-size // PAGE) * PAGE for size in new), room(small)
    for share in (0.0, 0.4, 0.8):
        kept = at_first - room(small)  # of the attempts before
        filler = fill(small, int(share * needed) - kept)
        result = work(*STAGES[stage], "--quiet", ok=False)
        assert result.exit_code == 4, (share, result.stderr)
        (line,) = result.stderr.splitlines()
        assert line.startswith("Error: ") and "no room on disk" in line
        filler.unlink()
        after = files_of(small)
        lost = [name for name, data in before.items() if after.get(name) != data]
        assert lost == []
        assert not [name for name in after if Path(name).parts[-2:-1] == (".qncd-writing",)]
    work(*STAGES[stage])
    after = files_of(small)
    assert [name for name in wanted if after.get(name) != wanted[name]] == []
    assert after.keys() == wanted.keys()


def test_a_complete_run_is_repeated_on_a_disk_that_cannot_be_written(sampled_shallow, tmp_path):
    work = Qncd(shutil.copytree(sampled_shallow, tmp_path / "work"))
    for command in STAGES.values():
        work(*command)
    before = files_of(work.folder)
    mounted(work.folder, "--bind", str(work.folder))
    try:
        mounted(work.folder, "-o", "remount,ro,bind")
        with pytest.raises(OSError, match="Read-only"):
            (work.folder / "new").touch()
        said = {name: work(*command).stdout for name, command in STAGES.items()}
    finally:
        subprocess.run(["umount", "--lazy", str(work.folder)], check=True)
    assert [name for name, text in said.items() if f"{name}: unchanged, skipped" not in text] == []
    assert files_of(work.folder) == before
