"""A command in a batch job: defaults from the environment, and as little noise as is wanted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Qncd
from processes import code_of

RUN = Path("runs/tiny")


@pytest.fixture
def work(sampled_shallow, tmp_path) -> Qncd:
    """A copy of a run that is sampled."""
    return Qncd(shutil.copytree(sampled_shallow, tmp_path / "work"))


def test_the_environment_names_the_run_and_the_device(work, monkeypatch):
    shutil.copytree(work.folder / RUN, work.folder / "elsewhere")
    monkeypatch.setenv("QNCD_RUN_DIR", "elsewhere")
    assert work("sample", "--num", "6", "--json").data["run_dir"] == "elsewhere"
    assert work("quantize", "--run-dir", str(RUN), "--json").data["run_dir"] == str(RUN)
    monkeypatch.setenv("QNCD_DEVICE", "cuda:77")
    failed = work("sample", "--num", "7", ok=False)
    assert failed.exit_code == 6
    assert "cuda:77" in failed.stderr
    assert work("sample", "--num", "6", "--device", "cpu", "--json").data["skipped"]


def test_quiet_leaves_errors_alone_on_stderr(work):
    new = ("sample", "--num", "2", "--name", "new", "--no-compile")
    assert work(*new).stderr
    quiet = work(*new, "--force", "--quiet", "--json")
    assert quiet.stderr == ""
    assert json.loads(quiet.stdout)["images"] == 2
    failed = work("eval", "--name", "none", "--quiet", ok=False)
    assert failed.exit_code == 4
    assert failed.stderr.startswith("Error: ")
    assert len(failed.stderr.splitlines()) == 1


def test_a_merge_has_a_command_of_its_own(work):
    new = ("sample", "--num", "6", "--batch-size", "2", "--name", "new", "--no-compile")
    assert code_of(work.folder, *new, "--shard", "1/2") == 0
    assert work("merge", "--name", "new", ok=False).exit_code == 4
    assert code_of(work.folder, *new, "--shard", "2/2") == 0
    said = work("merge", "--name", "new").stdout
    assert said.startswith("merge: done in") and "images 6" in said
    assert work("merge", "--name", "new").stdout.startswith("merge: unchanged, skipped")
    assert work("merge", "--name", "../new", ok=False).exit_code == 2
