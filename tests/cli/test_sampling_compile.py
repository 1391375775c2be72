"""--compile of `qncd sample`: what is drawn, what is kept, what is said."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import LEAST, Qncd, sampled_in, save_tiny_pipeline
from safetensors.torch import load_file

from qncd_cli.backends import int8
from qncd_cli.backends.compiled import graph
from qncd_cli.metrics.tensor import sqnr_db
from qncd_cli.runtime import preparation

why = int8.why_unavailable(torch.device("cpu"))
pytestmark = pytest.mark.skipif(bool(why), reason=why)


@pytest.fixture(scope="module")
def least(tmp_path_factory):
    """A run of a model that takes little compiling. Do not change."""
    folder = tmp_path_factory.mktemp("least")
    save_tiny_pipeline(folder / "model", **LEAST)
    return sampled_in(folder / "work", folder / "model")


@pytest.fixture
def own(tmp_path, least):
    """A run of our own, with six samples that no graph drew."""
    folder = tmp_path / "own"
    shutil.copytree(least, folder)
    return Qncd(folder)


def set_of(runner, name):
    folder = runner.folder / "runs" / "tiny" / "samples" / name
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest, load_file(folder / "latents.safetensors")["latents"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(bool(graph.why_unavailable()), reason=graph.why_unavailable())
def test_a_graph_is_compiled_once_and_a_set_goes_on_as_it_began(own, operators):
    draw = ("sample", "--num", "6", "--batch-size", "4")
    first = own(*draw, "--compile", "--name", "graph")
    assert first.stderr.count("compiling the denoiser") == 1
    manifest, latents = set_of(own, "graph")
    assert manifest["compiled"] is True
    eager_manifest, eager = set_of(own, "quantized")
    assert "compiled" not in eager_manifest
    assert not torch.equal(latents, eager)
    assert sqnr_db(eager, latents) > 30
    # what lies there is used, in other sets and by the set's own continuation; a set of eager
    # samples stays one
    again = own(*draw, "--name", "again")
    assert "compiling" not in again.stderr
    assert torch.equal(set_of(own, "again")[1], latents)
    own("sample", "--num", "8", "--batch-size", "4", "--name", "graph")
    assert torch.equal(set_of(own, "graph")[1][:6], latents)
    own("sample", "--num", "8", "--batch-size", "4")
    assert torch.equal(set_of(own, "quantized")[1][:6], eager)
    part = (*draw, "--inter", "runtime", "--set", "correction.inter.part=0.25")
    part += ("--set", "correction.inter.baseline=none")
    own(*part, "--name", "part")  # an extra call for one of four
    own(*part, "--no-compile", "--name", "eager part")
    assert set_of(own, "part")[0]["compiled"] is True
    assert sqnr_db(set_of(own, "eager part")[1], set_of(own, "part")[1]) > 30
    refused = own(*draw, "--no-compile", "--name", "graph", ok=False)
    assert refused.exit_code == 4
    assert "other settings (compiled: true -> none)" in refused.stderr


def test_without_a_compiler_only_a_wish_is_refused(own, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused = own("sample", "--num", "2", "--compile", "--name", "wished", ok=False)
    assert refused.exit_code == 6
    assert refused.stderr.count("no-such-compiler") == 1
    assert not (own.folder / "runs" / "tiny" / "samples" / "wished").exists()
    small = own("sample", "--num", "2", "--name", "small")
    assert "compile" not in small.stderr
    monkeypatch.setattr(preparation, "WORTH_COMPILING", 0)
    worth_it = own("sample", "--num", "2", "--name", "large")
    assert worth_it.stderr.count("no-such-compiler") == 1
    assert "uncompiled" in worth_it.stderr
    assert torch.equal(set_of(own, "large")[1], set_of(own, "small")[1])
    assert "compile" not in own("sample", "--num", "2", "--no-compile", "--name", "no").stderr


def test_only_integers_are_compiled(own):
    refused = own("sample", "--compile", "--backend", "simulate", "--name", "s", ok=False)
    assert refused.exit_code == 6
    assert "simulate has no graph" in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(bool(graph.why_unavailable()), reason=graph.why_unavailable())
def test_full_precision_is_compiled_where_that_is_asked_for_only(own, operators, monkeypatch):
    monkeypatch.setattr(preparation, "WORTH_COMPILING", 0)
    draw = ("sample", "--full-precision", "--batch-size", "4", "--num")
    plain = own(*draw, "4")
    assert "compiling" not in plain.stderr
    made = own(*draw, "4", "--compile")
    assert made.stderr.count("compiling the denoiser") == 1
    manifest, latents = set_of(own, "full_compiled")
    assert manifest["compiled"] is True and manifest["kind"] == "full"
    assert sqnr_db(set_of(own, "full")[1][:4], latents) > 80
    own(*draw, "6", "--name", "full_compiled")
    assert torch.equal(set_of(own, "full_compiled")[1][:4], latents)
