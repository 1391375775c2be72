"""--backend openvino of `qncd sample`: the denoiser as a graph that is exported once."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import SHALLOW, Qncd, save_tiny_pipeline, tiny_config
from safetensors.torch import load_file

from qncd_cli.backends import base
from qncd_cli.backends.onnx import runtimes
from qncd_cli.metrics.tensor import sqnr_db
from qncd_cli.runtime import auto_backend

RUN = ("runs", "tiny")
DRAW = ("sample", "--num", "6", "--batch-size", "4", "--backend", "openvino")


@pytest.fixture
def own(tmp_path, sampled_shallow):
    folder = tmp_path / "own"
    shutil.copytree(sampled_shallow, folder)
    return Qncd(folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, sampled_shallow):
    """A run with its graph and the set "graph". Do not change."""
    runner = Qncd(shutil.copytree(sampled_shallow, tmp_path_factory.mktemp("exported") / "own"))
    said = runner(*DRAW, "--name", "graph").stderr
    assert said.count("exporting the denoiser") == 1
    return runner


def set_of(runner, name):
    folder = runner.folder.joinpath(*RUN, "samples", name)
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest, load_file(folder / "latents.safetensors")["latents"]


def graphs_of(runner):
    return sorted(runner.folder.joinpath(*RUN, "compiled").glob("*_openvino"))


def test_images_are_those_of_the_simulation_up_to_single_codes(exported, own):
    own("sample", "--num", "6", "--batch-size", "4", "--backend", "simulate", "--name", "simulated")
    manifest, latents = set_of(exported, "graph")
    assert manifest["backend"] == "openvino"
    simulated = set_of(own, "simulated")[1]
    assert not torch.equal(latents, simulated)
    assert sqnr_db(simulated, latents) > 30


def test_a_graph_is_exported_once_for_any_batch_size(exported, tmp_path):
    runner = Qncd(shutil.copytree(exported.folder, tmp_path / "own"))
    (place,) = graphs_of(runner)
    assert {path.name for path in place.iterdir()} == {"denoiser.xml", "denoiser.bin", "sealed"}
    again = runner(*DRAW, "--name", "again")
    assert "exporting" not in again.stderr
    assert torch.equal(set_of(runner, "again")[1], set_of(runner, "graph")[1])
    runner("sample", "--num", "6", "--batch-size", "6", "--backend", "openvino", "--name", "six")
    assert sqnr_db(set_of(runner, "graph")[1], set_of(runner, "six")[1]) > 30
    assert graphs_of(runner) == [place]


def test_a_set_goes_on_with_its_own_backend(exported, tmp_path):
    runner = Qncd(shutil.copytree(exported.folder, tmp_path / "own"))
    refused = runner("sample", "--num", "8", "--name", "graph", "--backend", "simulate", ok=False)
    assert refused.exit_code == 4
    assert "backend: openvino -> simulate" in refused.stderr
    runner("sample", "--num", "8", "--batch-size", "4", "--name", "graph", "--backend", "openvino")
    assert torch.equal(set_of(runner, "graph")[1][:6], set_of(exported, "graph")[1])


def test_in_bfloat16_a_kept_graph_draws_what_the_new_one_drew(tmp_path):
    save_tiny_pipeline(tmp_path / "model", **SHALLOW)
    runner = Qncd(tmp_path)
    runner.write_config(tiny_config(tmp_path / "model", model__dtype="bfloat16"))
    runner("calibrate", "--config", "tiny.yaml")
    runner("quantize")
    assert "exporting" in runner(*DRAW, "--name", "first").stderr
    assert "exporting" not in runner(*DRAW, "--name", "second").stderr
    assert torch.equal(set_of(runner, "first")[1], set_of(runner, "second")[1])


def test_auto_tries_a_kept_graph_and_goes_on_with_it(exported, tmp_path, monkeypatch):
    runner = Qncd(shutil.copytree(exported.folder, tmp_path / "own"))
    seconds = {"int8": 3.0, "simulate": 2.0, "openvino": 1.0}
    monkeypatch.setattr(auto_backend, "WORTH_TIMING", 0)
    monkeypatch.setattr(auto_backend, "_seconds", lambda subject, _: seconds[subject.backend.name])
    draw = ("sample", "--batch-size", "4", "--name", "auto", "--num")
    said = runner(*draw, "6").stderr
    assert "backend openvino: " in said and "openvino 1" in said and "exporting" not in said
    manifest, latents = set_of(runner, "auto")
    assert manifest["backend"] == "openvino"
    assert torch.equal(latents, set_of(exported, "graph")[1])
    seconds["openvino"] = 9.0
    (runner.folder.joinpath(*RUN) / "compiled" / auto_backend.FILE).unlink()
    assert "seconds a call" not in runner(*draw, "8").stderr  # a set is not asked again
    assert torch.equal(set_of(runner, "auto")[1][:6], latents)


def test_a_damaged_graph_is_made_again(exported, tmp_path):
    runner = Qncd(shutil.copytree(exported.folder, tmp_path / "own"))
    (place,) = graphs_of(runner)
    weights = bytearray((place / "denoiser.bin").read_bytes())
    weights[len(weights) // 2] ^= 64
    (place / "denoiser.bin").write_bytes(weights)
    again = runner(*DRAW, "--name", "other")
    assert "damaged, or not exported by you: made again" in again.stderr
    assert torch.equal(set_of(runner, "other")[1], set_of(exported, "graph")[1])


@pytest.mark.parametrize("option", ["--compile", "--low-memory"])
def test_what_means_nothing_there_is_refused(own, option):
    refused = own(*DRAW, option, "--name", "wished", ok=False)
    assert refused.exit_code in (2, 6)
    assert option in refused.stderr
    assert not graphs_of(own)


def test_without_the_package_it_says_what_is_missing(own, monkeypatch):
    monkeypatch.setattr(runtimes, "why_missing", lambda packages: "openvino")
    refused = own(*DRAW, "--name", "fresh", ok=False)
    assert refused.exit_code == 6
    assert "the package openvino is not installed" in refused.stderr
    assert base.get_backend("auto").name != "openvino"
