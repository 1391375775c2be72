"""Samples of `qncd sample` that depend on their batch: estimates of a part or of all of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import Qncd
from safetensors.torch import load_file

from qncd_cli.stages import sample as stage

RUNTIME = ("--inter", "runtime", "--set", "correction.inter.interval=1")
RUNTIME += ("--set", "correction.inter.baseline=none")
PART = (*RUNTIME, "--set", "correction.inter.part=0.5")
BATCH = (*RUNTIME, "--set", "correction.inter.granularity=batch")
DRAW = ("sample", "--num", "8", "--batch-size", "4")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, sampled):
    """A run with the sets "whole", "part" and "batch". Do not change."""
    runner = Qncd(shutil.copytree(sampled, tmp_path_factory.mktemp("drawn") / "own"))
    runner(*DRAW, "--name", "whole", *RUNTIME)
    runner(*DRAW, "--name", "part", *PART)
    runner(*DRAW, "--name", "batch", *BATCH)
    return runner


@pytest.fixture
def own(drawn, tmp_path):
    return Qncd(shutil.copytree(drawn.folder, tmp_path / "own"))


def folder_of(runner, name):
    return runner.folder / "runs" / "tiny" / "samples" / name


def files(runner, name):
    return {path.name: path.read_bytes() for path in folder_of(runner, name).iterdir()}


def set_of(runner, name):
    folder = folder_of(runner, name)
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest, load_file(folder / "latents.safetensors")["latents"]


def test_the_first_half_of_every_batch_is_drawn_as_without(drawn):
    (whole_manifest, whole), (manifest, part) = set_of(drawn, "whole"), set_of(drawn, "part")
    same = [torch.equal(a, b) for a, b in zip(whole, part, strict=True)]
    assert same == [True, True, False, False] * 2
    assert manifest["correction"]["part"] == 0.5
    assert manifest["batches"] == {"first_seed": 0, "count": 8, "size": 4}
    assert manifest["extra_calls"] == whole_manifest["extra_calls"] == 3
    assert "part" not in whole_manifest["correction"] and "batches" not in whole_manifest


def test_one_estimate_for_all_changes_every_sample_and_is_recorded(drawn):
    (_, whole), (manifest, batch) = set_of(drawn, "whole"), set_of(drawn, "batch")
    assert not any(torch.equal(a, b) for a, b in zip(whole, batch, strict=True))
    assert manifest["correction"]["granularity"] == "batch"
    assert manifest["batches"] == {"first_seed": 0, "count": 8, "size": 4}


@pytest.mark.parametrize(("name", "how"), [("part", PART), ("batch", BATCH)])
@pytest.mark.parametrize(
    "change",
    [("--num", "10"), ("--num", "6"), ("--batch-size", "2"), ("--seed", "4")],
    ids=lambda change: change[0] + change[1],
)
def test_other_batches_are_refused_in_one_line(own, change, name, how):
    before = files(own, name)
    refused = own(*DRAW, "--name", name, *how, *change, ok=False)
    assert refused.exit_code == 4
    (line,) = refused.stderr.strip().splitlines()[-1:]
    assert "samples depend on their batches" in line and "--force" in line
    assert files(own, name) == before


@pytest.mark.parametrize(("name", "how"), [("part", PART), ("batch", BATCH)])
def test_an_interrupted_set_is_finished_to_the_same_bytes(own, monkeypatch, name, how):
    draw_batch, first = stage.draw_batch, []

    def once(*arguments):
        if first:
            raise KeyboardInterrupt
        first.append(draw_batch(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(stage, "draw_batch", once)
        assert own(*DRAW, "--name", "again", *how, ok=False).exit_code == 130
    assert not (folder_of(own, "again") / "latents.safetensors").exists()
    own(*DRAW, "--name", "again", *how)
    assert files(own, "again") == files(own, name)


@pytest.mark.parametrize("part", ["0", "1.5", "-0.25", ".nan", "half"])
def test_what_is_no_part_is_refused_in_one_line(own, part):
    refused = own(*DRAW, "--set", f"correction.inter.part={part}", ok=False)
    assert refused.exit_code == 3
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "correction.inter.part" in refused.stderr
