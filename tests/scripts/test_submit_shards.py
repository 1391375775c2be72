"""Shards submitted to an engine, and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import submit_shards
from click.testing import CliRunner

SET = Path("runs/tiny/samples")
ARGUMENTS = ["--run-dir", "runs/tiny", "--name", "new", "--shards"]
OPTIONS = ["--", "--num", "4", "--batch-size", "2", "--no-compile"]


@pytest.mark.slow
def test_shards_are_drawn_and_merged_and_a_failure_is_the_scripts_own(
    sampled_shallow, tmp_path, monkeypatch
):
    monkeypatch.chdir(shutil.copytree(sampled_shallow, tmp_path / "work"))
    run = CliRunner().invoke
    done = run(submit_shards.main, ["--engine", "local", *ARGUMENTS, "1", *OPTIONS, "--steps", "7"])
    assert done.exit_code == 3
    assert "exit code 3: Error: the ptqd correction was prepared" in done.stderr
    done = run(submit_shards.main, ["--engine", "local", *ARGUMENTS, "2", *OPTIONS])
    assert done.exit_code == 0, done.stderr
    assert sorted(done.stderr.splitlines()[i].partition(": ")[2] for i in (0, 1)) == [
        "shard 1/2, drawn",
        "shard 2/2, drawn",
    ]
    manifest = json.loads((SET / "new/manifest.json").read_text())
    assert manifest["complete"] and manifest["seeds"] == [0, 1, 2, 3]
    assert not (SET / "new.shards").exists()


@pytest.mark.parametrize(("engine", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_an_engine_that_is_not_installed_is_named(engine, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    done = CliRunner().invoke(submit_shards.main, ["--engine", engine, *ARGUMENTS, "2"])
    assert done.exit_code == 6
    assert f"{package} is not installed (pip install {package})" in done.stderr
