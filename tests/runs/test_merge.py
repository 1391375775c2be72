"""Shards and their merge: the set that one process draws, or one line that says what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Qncd
from processes import started

SET = Path("runs/tiny/samples/new")
SHARDS = SET.with_name("new.shards")
SAMPLE = ("sample", "--num", "7", "--batch-size", "2", "--name", "new", "--no-compile")
MERGE = ("merge", "--name", "new")


@pytest.fixture
def work(sampled_shallow, tmp_path) -> Qncd:
    """A copy of a run that is quantized."""
    return Qncd(shutil.copytree(sampled_shallow, tmp_path / "work"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def whole(work) -> dict[str, bytes]:
    """The files of the set as one process draws it, which is there no more; its sheet too."""
    work(*SAMPLE)
    sheet = work.folder / SET.with_name("new_sheet.png")
    files = files_of(work.folder / SET) | {"sheet": sheet.read_bytes()}
    shutil.rmtree(work.folder / SET)
    sheet.unlink()
    return files


def merged(work: Qncd) -> dict[str, bytes]:
    sheet = work.folder / SET.with_name("new_sheet.png")
    return files_of(work.folder / SET) | {"sheet": sheet.read_bytes()}


def test_shards_at_once_and_a_merge_are_byte_for_byte_what_one_process_draws(work, whole):
    processes = [started(work.folder, *SAMPLE, "--shard", f"{i}/3") for i in (1, 2, 3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    result = work(*MERGE, "--json")
    assert json.loads(result.stdout)["images"] == 7
    assert merged(work) == whole
    assert not (work.folder / SHARDS).exists()
    assert not list((work.folder / "runs").rglob(".lock"))
    again = json.loads(work(*MERGE, "--json").stdout)
    assert (again["skipped"], again["images"]) == (True, 7)
    assert json.loads(work(*SAMPLE, "--json").stdout)["skipped"]


def test_a_merge_says_which_shard_is_missing_unfinished_or_damaged(work, whole):
    def refused(*arguments: str) -> str:
        result = work(*MERGE, *arguments, ok=False)
        assert result.exit_code == 4
        assert not (work.folder / SET).exists()
        (line,) = result.stderr.splitlines()
        return line

    assert "new.shards: no shards are there" in refused()
    work(*SAMPLE, "--shard", "1/2")
    assert 'shard 2/2 (seeds 4-6) is missing (draw it with "qncd sample --shard 2/2"' in refused()
    work(*SAMPLE, "--shard", "2/2")
    second = work.folder / SHARDS / "2-of-2"
    manifest = json.loads((second / "manifest.json").read_text())
    (second / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    assert "shard 2/2 (seeds 4-6) is not finished" in refused()
    (second / "manifest.json").write_text(json.dumps(manifest))
    (second / "000005.png").unlink()
    assert "shard 2/2 (seeds 4-6) lacks 1 images (first: 000005.png)" in refused()
    work(*SAMPLE, "--shard", "2/2")  # made from its latent
    latents = (second / "latents.safetensors").read_bytes()
    (second / "latents.safetensors").write_bytes(latents[:-1] + bytes([latents[-1] ^ 1]))
    assert "2-of-2/latents.safetensors: damaged" in refused()
    (second / "latents.safetensors").write_bytes(latents)
    work(*MERGE)
    assert merged(work) == whole


def test_shards_of_other_settings_are_not_joined(work):
    work(*SAMPLE, "--shard", "1/2")
    work(*SAMPLE, "--shard", "2/2", "--classes", "1")
    result = work(*MERGE, ok=False)
    assert result.exit_code == 4
    assert "2-of-2: not of the same set as 1-of-2 (sampling.classes: all -> [1])" in result.stderr
    work(*SAMPLE, "--shard", "2/2", "--force", "--num", "8")
    assert "num: 7 -> 8" in work(*MERGE, ok=False).stderr


def test_a_shard_goes_on_and_one_that_is_finished_is_skipped(work, whole):
    first = json.loads(work(*SAMPLE, "--shard", "1/2", "--json").stdout)
    assert (first["images"], first["skipped"]) == (4, False)
    assert first["images_per_second"] > 0
    assert json.loads(work(*SAMPLE, "--shard", "1/2", "--json").stdout)["skipped"]
    assert json.loads(work(*SAMPLE, "--shard", "9/9", "--json").stdout)["images"] == 1
    assert json.loads(work(*SAMPLE, "--shard", "1/9", "--json").stdout)["images"] == 0


def test_a_merge_extends_the_set_that_is_there_and_replaces_another_only_if_forced(work, whole):
    few = ("sample", "--num", "2", "--batch-size", "2", "--name", "new", "--no-compile")
    work(*few, "--classes", "1")
    for shard in ("1/2", "2/2"):
        work(*SAMPLE, "--shard", shard)
    result = work(*MERGE, ok=False)
    assert result.exit_code == 4
    assert "sampling.classes: [1] -> all" in result.stderr
    work(*few, "--force")
    work(*MERGE)
    assert merged(work) == whole
