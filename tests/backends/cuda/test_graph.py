"""A denoiser as one graph, with norms and quantizations joined."""

from __future__ import annotations

import collections
import json

import pytest
import torch
from conftest import Qncd
from torch import nn

from qncd_cli.backends.compiled.graph import Tables
from qncd_cli.backends.cuda import graph as graph_module
from qncd_cli.backends.cuda import layers, ops
from qncd_cli.backends.cuda.graph import fused_graph
from qncd_cli.models.loading import load_model
from qncd_cli.quant.attention import AttentionProducts
from qncd_cli.quant.layers import StepState
from qncd_cli.runtime.denoiser import quantized_denoiser
from qncd_cli.store import artifacts

from ..test_int8 import layer_of, random


@pytest.fixture(scope="module")
def tiny(sampled_shallow):
    model = load_model(str(sampled_shallow.parent / "model"))
    artifact = artifacts.read(sampled_shallow / "runs/tiny/quantized.safetensors", "quantized")
    with torch.no_grad():
        condition = model.condition(model.labels([0, 1], "all"))
    return model, artifact, condition


def calls(graph: torch.fx.GraphModule) -> collections.Counter:
    return collections.Counter(node.target for node in graph.graph.nodes)


def test_a_whole_denoiser(tiny, monkeypatch):
    """Every norm before a layer is joined, attention multiplies bytes, and predictions are those of
    single layers to 50 dB: the order of a norm's sums may move a value to the next code."""
    monkeypatch.setattr(graph_module, "WORTH_INTEGERS", {"macs": 0, "width": 0})
    model, artifact, condition = tiny
    x = random(2, *model.latent_shape)
    denoiser = quantized_denoiser(model, artifact, layers.NAME, True)
    graph = fused_graph(denoiser.module, denoiser.step, (x, condition))
    found = calls(graph)
    norms = [type(m) for m in denoiser.module.modules()]
    assert found[ops.IMAGE_BYTES] >= 10
    assert found[ops.ROW_BYTES] >= 3
    assert found[ops.BYTE_MATMUL] >= 2
    parts = [m for m in denoiser.module.modules() if isinstance(m, AttentionProducts)]
    assert parts and all(part.matmul is part.worth is None for part in parts)
    assert found[torch.ops.aten.layer_norm.default] == 0
    assert found[torch.ops.aten.group_norm.default] < norms.count(nn.GroupNorm)
    tables = Tables(denoiser.module).values
    expected = denoiser(x, torch.tensor(900), condition)
    row = tables[denoiser.step.group]
    prediction = graph(x, torch.full((2,), 900.0), row, condition)
    assert expected.std() > 0.01
    assert (prediction - expected).square().mean() <= 1e-5 * expected.square().mean()


class Block(nn.Module):
    """A layer that another one alone reads, then layer norm with modulation."""

    def __init__(self):
        super().__init__()
        self.first = layer_of(nn.Conv2d(6, 8, 3, padding=1))
        self.second = layer_of(nn.Conv2d(8, 8, 1), smoothing=random(8).abs() + 0.3)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.third = layer_of(nn.Linear(8, 4), 4)
        self.step = self.first.step
        for layer in (self.first, self.second, self.third):
            layer.compute, layer.step = layers.compute, self.step

    def forward(self, x, t, modulation):
        y = self.second(self.first(x)).flatten(2).transpose(1, 2)
        multiplier, addend = modulation.chunk(2, 1)
        y = self.norm(y) * (1 + multiplier[:, None]) + addend[:, None]
        return Sample(self.third(y))


class Sample:
    def __init__(self, sample):
        self.sample = sample


def test_codes_are_written_at_once_and_modulated_norms_joined():
    block, step = Block().eval(), StepState()
    step = block.step
    x, modulation = random(3, 6, 5, 4), random(3, 16, seed=2)
    graph = fused_graph(block, step, (x, {"modulation": modulation}))
    found = calls(graph)
    assert (found[ops.BYTES], found[ops.ROW_BYTES], found[ops.BYTE_PRODUCT]) == (1, 1, 3)
    with torch.no_grad():
        expected = block(x, None, modulation).sample
        row = Tables(block).values[0]
        for rows in (3, 2):  # of another size than it was traced with
            prediction = graph(x[:rows], torch.zeros(rows), row, {"modulation": modulation[:rows]})
            error = (prediction - expected[:rows]).square().mean()
            assert error <= 1e-4 * expected.square().mean()


@pytest.mark.slow
def test_the_command_line_fuses_where_it_is_asked_to(sampled_shallow):
    folder = sampled_shallow
    how = ("--num", "1", "--steps", "1", "--inter", "none", "--backend", layers.NAME)
    Qncd(folder)("sample", *how, "--name", "fused", "--compile")
    manifest = json.loads((folder / "runs/tiny/samples/fused/manifest.json").read_text())
    assert (manifest["backend"], manifest["compiled"]) == (layers.NAME, True)
