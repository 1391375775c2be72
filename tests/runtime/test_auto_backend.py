"""What `auto` takes: timed once where it is worth it, remembered, never a reason to fail."""

from __future__ import annotations

import json

import pytest
import torch

from qncd_cli.backends import int8
from qncd_cli.backends.base import AUTO, BACKENDS
from qncd_cli.backends.int8 import KERNEL
from qncd_cli.backends.reference import PARTS
from qncd_cli.quant.layers import QuantizedLayer
from qncd_cli.runtime import auto_backend, exported_graph
from qncd_cli.runtime.auto_backend import BackendCache, backend_of_set, choose_backend
from qncd_cli.runtime.sampled_model import SampledModel
from qncd_cli.store import own_code

CPU = torch.device("cpu")
why = int8.why_unavailable(CPU)
pytestmark = pytest.mark.skipif(bool(why), reason=why)


class Auto:
    """`choose_backend` on the tiny model; said: what it told."""

    def __init__(self, made, folder, monkeypatch):
        self.made, self.folder, self.said = made, folder, []
        self.timed = []
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(auto_backend, "WORTH_TIMING", 0)
        seconds = auto_backend._seconds

        def watched(sampled, inputs):
            self.timed.append(sampled.backend.name)
            return seconds(sampled, inputs)

        monkeypatch.setattr(auto_backend, "_seconds", watched)

    def pretend(self, **seconds):
        """What the next timings come to."""

        def timed(sampled, inputs):
            self.timed.append(sampled.backend.name)
            return seconds[sampled.backend.name]

        self.monkeypatch.setattr(auto_backend, "_seconds", timed)

    def untried(self, **options):
        _, model, artifact, noise_stats = self.made
        return SampledModel.quantized(model, artifact, noise_stats, AUTO, **options)

    def __call__(self, low_memory=False, **digests):
        self.timed.clear()
        sampled = self.untried(low_memory=low_memory)
        cache = BackendCache(self.folder, {**sampled.digests, **digests}, low_memory)
        return self.choose(sampled, cache)

    def choose(self, sampled, cache):
        model, tell = self.made[1], self.said.append
        return choose_backend(model, sampled, cache, self.folder, tell, batch=4, ahead=16)

    @property
    def file(self):
        return self.folder / auto_backend.FILE


@pytest.fixture
def auto(made, tmp_path, monkeypatch):
    return Auto(made, tmp_path, monkeypatch)


def call(made, sampled):
    x, t, condition = auto_backend._inputs(made[1], 3)
    return sampled.denoiser(x, t, condition)


def kept(sampled, name):
    layers = [m for m in sampled.denoiser.module.modules() if isinstance(m, QuantizedLayer)]
    return any(name in layer.prepared for layer in layers)


def test_it_is_timed_once_and_remembered(auto):
    first = auto()
    assert auto.timed == ["int8", "simulate"]
    assert "the fastest of those tried (seconds a call: int8 " in first.backend.remark
    second = auto()
    assert auto.timed == []
    assert second.backend.name == first.backend.name
    assert "the fastest as measured before (seconds a call: " in second.backend.remark
    (entry,) = json.loads(auto.file.read_text()).values()
    assert entry["chosen"] == first.backend.name
    assert entry["machine"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("winner", "keeps", "lets_go"),
    [
        ("int8", KERNEL, PARTS),
        ("simulate", PARTS, KERNEL),
    ],
)
def test_the_fastest_computes_and_the_other_lets_go(auto, made, winner, keeps, lets_go):
    seconds = {"int8": 2.0, "simulate": 2.0, winner: 1.0}
    auto.pretend(**seconds)
    sampled = auto()
    assert sampled.backend.name == winner
    layers = [m for m in sampled.denoiser.module.modules() if isinstance(m, QuantizedLayer)]
    assert {layer.compute for layer in layers} == {BACKENDS[winner].compute}
    expected = call(made, auto.untried())
    assert torch.equal(call(made, sampled), expected)
    assert kept(sampled, keeps) and not kept(sampled, lets_go)
    assert auto().backend.name == winner


def test_what_was_overtaken_lets_go_of_its_kernels_at_once(auto):
    sampled = auto()
    lost = {"int8": PARTS, "simulate": KERNEL}[sampled.backend.name]
    assert not kept(sampled, lost)


def test_little_work_is_not_timed_but_follows_what_is_remembered(auto, monkeypatch):
    monkeypatch.setattr(auto_backend, "WORTH_TIMING", 10**6)
    sampled = auto()
    assert auto.timed == [] and not auto.file.exists()
    assert sampled.backend.name == "int8"
    assert "too little work" in sampled.backend.remark
    monkeypatch.setattr(auto_backend, "WORTH_TIMING", 0)
    auto.pretend(int8=2.0, simulate=1.0)
    auto()
    monkeypatch.setattr(auto_backend, "WORTH_TIMING", 10**6)
    assert auto().backend.name == "simulate"
    assert auto.timed == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe",
        b'{"KEY": 3}',
        b'{"KEY": {"seconds": {"int8": 1.0}}}',
        b'{"KEY": {"seconds": {"int8": "fast", "simulate": NaN}}}',
    ],
)
def test_a_damaged_file_is_measured_again(auto, content):
    auto()
    (key,) = json.loads(auto.file.read_text())
    auto.file.write_bytes(content.replace(b"KEY", key.encode()))
    auto()
    assert auto.timed == ["int8", "simulate"]
    auto()
    assert auto.timed == []


def test_another_machine_or_artifact_is_measured_for_itself(auto, monkeypatch):
    auto()
    auto(quantized="another")
    assert len(auto.timed) == 2
    own = auto_backend.described()
    monkeypatch.setattr(auto_backend, "described", lambda: {**own, "cpu": "another"})
    auto()
    assert len(auto.timed) == 2
    monkeypatch.setattr(auto_backend, "described", lambda: own)
    auto()
    auto(quantized="another")
    assert auto.timed == []


def test_with_little_memory_nothing_is_kept(auto):
    auto()
    sampled = auto(low_memory=True)
    assert len(auto.timed) == 2  # takes other times
    assert not kept(sampled, KERNEL) and not kept(sampled, PARTS)


def test_where_there_is_no_choice_nothing_is_timed(auto, monkeypatch):
    monkeypatch.setenv(int8.SWITCH, "1")
    sampled = auto()
    assert sampled.backend.name == "simulate"
    assert auto.timed == [] and not auto.file.exists()


@pytest.mark.skipif(
    bool(BACKENDS["openvino"].why_unavailable(CPU)), reason="needs the extra openvino"
)
def test_a_graph_that_cannot_be_loaded_is_passed_over(auto):
    graph = exported_graph.openvino_graph(auto.folder, auto.untried().digests)
    graph.parent.mkdir(parents=True)
    graph.write_text("<net")
    own_code.seal_folder(graph.parent)
    auto.pretend(int8=2.0, simulate=1.0)
    assert auto().backend.name == "simulate"
    (line,) = auto.said
    assert line.startswith("openvino was not tried") and "\n" not in line


def test_full_precision_has_no_backend(auto):
    sampled = SampledModel.full_precision(auto.made[1])
    assert auto.choose(sampled, BackendCache(auto.folder, {})) is sampled


@pytest.mark.parametrize(
    ("manifest", "low_memory", "backend"),
    [
        (None, False, AUTO),
        ({}, False, AUTO),
        ({"backend": "abacus"}, False, AUTO),
        ({"backend": 3}, False, AUTO),
        ({"backend": "simulate"}, False, "simulate"),
        ({"backend": "simulate"}, True, "simulate"),
        ({"backend": "openvino"}, True, AUTO),
    ],
)
def test_a_set_goes_on_with_what_it_began_with(manifest, low_memory, backend):
    assert backend_of_set(AUTO, manifest, CPU, low_memory=low_memory) == backend
    assert backend_of_set("int8", manifest, CPU, low_memory=low_memory) == "int8"


def test_a_set_of_a_backend_that_is_missing_here_is_not_gone_on_with(monkeypatch):
    monkeypatch.setenv(int8.SWITCH, "1")
    assert backend_of_set(AUTO, {"backend": "int8"}, CPU, low_memory=False) == AUTO
    assert backend_of_set(AUTO, {"backend": "int8"}, torch.device("cuda"), low_memory=False) == AUTO
