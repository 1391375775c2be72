"""status.json: what a supervisor reads while a stage works, and afterwards."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from conftest import Qncd

from qncd_cli.errors import ModelError
from qncd_cli.runs import status
from qncd_cli.runs.status import STATUS, reported
from qncd_cli.runs.watch import SILENT


def read(folder: Path) -> dict:
    return json.loads((folder / STATUS).read_text())


def test_a_loop_says_how_far_it_is_and_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "EVERY", 0.0)
    with reported(tmp_path, "sample", SILENT) as watch:
        assert read(tmp_path)["what"] == "preparing"
        for item in watch.track(range(4), "sampling", 4, "calls"):
            said = read(tmp_path)
            assert (said["state"], said["stage"], said["what"]) == ("running", "sample", "sampling")
            assert (said["done"], said["total"], said["unit"]) == (item, 4, "calls")
            assert (said["seconds_left"] is None) == (item == 0)
            assert (said["pid"], said["host"]) == (os.getpid(), socket.gethostname())
    assert (read(tmp_path)["state"], read(tmp_path)["seconds_left"]) == ("done", 0.0)


def test_what_ended_a_stage_is_told(tmp_path):
    (tmp_path / "kept").touch()
    with pytest.raises(ModelError), reported(tmp_path, "calibrate", SILENT):
        raise ModelError("no model", "name one")
    assert (read(tmp_path)["state"], read(tmp_path)["error"]) == ("failed", "no model (name one)")
    with pytest.raises(KeyboardInterrupt), reported(tmp_path, "calibrate", SILENT):
        raise KeyboardInterrupt
    assert read(tmp_path)["error"] == "KeyboardInterrupt"


def test_of_a_stage_that_made_nothing_nothing_is_left(tmp_path):
    with pytest.raises(ModelError), reported(tmp_path, "calibrate", SILENT):
        raise ModelError("no model")
    assert list(tmp_path.iterdir()) == []


def test_the_stages_write_theirs_and_shards_their_own(sampled_shallow, tmp_path):
    work = Qncd(shutil.copytree(sampled_shallow, tmp_path / "work"))
    run = work.folder / "runs/tiny"
    assert (read(run)["stage"], read(run)["state"]) == ("sample", "done")
    work("sample", "--num", "2", "--name", "new", "--shard", "1/1", "--no-compile")
    shard = read(run / "samples/new.shards/1-of-1")
    assert (shard["stage"], shard["state"]) == ("sample", "done")
    work("eval")
    assert read(run)["stage"] == "eval"
    before = (run / STATUS).read_bytes()
    assert work("eval", "--json").data
    assert (run / STATUS).read_bytes() == before  # nothing was done
