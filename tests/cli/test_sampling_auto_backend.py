"""--backend auto: what is said, what is remembered beside runs and tables, how sets go on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import Qncd, tiny_config
from safetensors.torch import load_file

from qncd_cli.backends import int8
from qncd_cli.runtime import auto_backend

why = int8.why_unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(bool(why), reason=why)

RUN = ("runs", "tiny")
DRAW = ("sample", "--num", "6", "--batch-size", "4", "--no-compile", "--name")


@pytest.fixture
def own(tmp_path, sampled):
    return Qncd(shutil.copytree(sampled, tmp_path / "own"))


@pytest.fixture
def timed(monkeypatch):
    """Every timing from now on, all worth it; simulate is the fastest as far as they go."""
    calls = []

    def seconds(sampled, inputs):
        calls.append(sampled.backend.name)
        return {"int8": 2.0, "simulate": 1.0}[sampled.backend.name]

    monkeypatch.setattr(auto_backend, "WORTH_TIMING", 0)
    monkeypatch.setattr(auto_backend, "_seconds", seconds)
    return calls


def set_of(runner, name):
    folder = runner.folder.joinpath(*RUN, "samples", name)
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest, load_file(folder / "latents.safetensors")["latents"]


def line_of(said):
    (line,) = [line for line in said.splitlines() if line.startswith("backend ")]
    return line


def remembered(runner, *folder):
    return runner.folder.joinpath(*(folder or RUN), "compiled", auto_backend.FILE)


def test_a_short_job_takes_the_first_and_measures_nothing(own):
    said = line_of(own(*DRAW, "short").stderr)
    assert said.startswith("backend int8: ") and "too little work" in said
    assert not remembered(own).exists()


def test_one_line_says_what_was_chosen_and_that_it_was_remembered(own, timed):
    first = line_of(own(*DRAW, "first").stderr)
    assert first.startswith("backend simulate: ")
    assert first.endswith("the fastest of those tried (seconds a call: int8 2, simulate 1)")
    assert timed == ["int8", "simulate"]
    second = line_of(own(*DRAW, "second").stderr)
    assert second.endswith("the fastest as measured before (seconds a call: int8 2, simulate 1)")
    assert timed == ["int8", "simulate"]
    assert set_of(own, "first")[0]["backend"] == set_of(own, "second")[0]["backend"] == "simulate"


def test_images_are_the_same_whatever_was_chosen(own, timed):
    own(*DRAW, "chosen")
    own(*DRAW, "asked", "--backend", "int8")
    (manifest, chosen), (other, asked) = set_of(own, "chosen"), set_of(own, "asked")
    assert (manifest["backend"], other["backend"]) == ("simulate", "int8")
    assert torch.equal(chosen, asked)


def test_a_set_goes_on_with_what_it_began_with(own, timed):
    own("sample", "--num", "8", "--batch-size", "4")  # the fixture's, drawn by int8
    assert timed == []
    manifest, _ = set_of(own, "quantized")
    assert manifest["backend"] == "int8" and len(manifest["seeds"]) == 8
    own("sample", "--num", "8", "--batch-size", "4", "--force")
    assert timed == ["int8", "simulate"]
    assert set_of(own, "quantized")[0]["backend"] == "simulate"
    remembered(own).unlink()
    own("sample", "--num", "10", "--batch-size", "4")
    assert timed == ["int8", "simulate"]
    assert set_of(own, "quantized")[0]["backend"] == "simulate"


def test_with_low_memory_it_is_chosen_as_well(own, timed):
    own("sample", "--num", "2", "--low-memory", "--name", "low")
    assert timed == ["int8", "simulate"]


def test_a_damaged_memory_is_no_error(own, timed):
    remembered(own).parent.mkdir(exist_ok=True)
    remembered(own).write_text("{")
    own(*DRAW, "first")
    own(*DRAW, "second")
    assert timed == ["int8", "simulate"]


TABLE = ("ablate", "--config", "tiny.yaml", "--num", "4", "--json", "--presets")


@pytest.fixture
def table(tmp_path, tiny_model):
    """A folder with the configuration of quick rows."""
    runner = Qncd(tmp_path)
    runner.write_config(
        tiny_config(
            tiny_model,
            sampling__steps=2,
            calibration={"trajectories": 2, "batch_size": 2, "noise_trajectories": 2},
            quantization__weights__rounding="nearest",
            quantization__activations__observer="minmax",
        )
    )
    return runner


def backends_of(table):
    manifests = table.folder.glob("runs/ablate_tiny/samples/*/manifest.json")
    return [json.loads(path.read_text())["backend"] for path in manifests]


def test_a_table_is_measured_once_for_all_its_rows(table, timed):
    first = table(*TABLE, "minmax,minmax+ptqd").data
    assert timed == ["int8", "simulate"]
    assert remembered(table, "runs", "ablate_tiny").is_file()
    second = table(*TABLE, "minmax,minmax+ptqd").data
    assert second["rows"] == first["rows"]  # none was drawn again
    table(*TABLE, "minmax,minmax+ptqd", "--bits", "w8a8")
    assert timed == ["int8", "simulate"]
    assert backends_of(table) == ["simulate"] * 4


def test_a_table_goes_on_with_the_backend_of_its_rows(table, timed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(auto_backend, "WORTH_TIMING", 10**6)
        first = table(*TABLE, "minmax").data
    both = table(*TABLE, "minmax,minmax+ptqd").data
    assert both["rows"][0] == first["rows"][0]
    assert timed == []
    assert backends_of(table) == ["int8"] * 2
