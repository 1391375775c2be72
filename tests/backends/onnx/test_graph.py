"""Layers of every kind in one graph: both runtimes compute what the simulation says."""

from __future__ import annotations

from types import SimpleNamespace

import onnx
import pytest
import torch
from torch import Tensor, nn

from qncd_cli.backends import onednn
from qncd_cli.backends.onnx import graph as onnx_graph
from qncd_cli.backends.onnx import runtimes
from qncd_cli.backends.onnx.layers import Form, weights_of
from qncd_cli.backends.onnx.signature import own_signature
from qncd_cli.backends.reference import simulate
from qncd_cli.quant.affine import choose_qparams
from qncd_cli.quant.attention_processors import QuantizedAttnProcessor
from qncd_cli.quant.layers import StepState
from qncd_cli.spec import ATTENTION_OPERANDS, activation_spec

from ..test_int8 import layer_of, random, relative

BOUNDS = (500.0,)
GROUPS = (3, 140)  # zero-points
POWERS = 2.0 ** torch.arange(-2, 6)  # dividing by them is exact

LAYERS = {
    "padded": layer_of(nn.Conv2d(6, 5, 3, padding=1), 8, 8, GROUPS),
    "strided": layer_of(nn.Conv2d(6, 5, 3, stride=2, padding=1, bias=False), 4, 8, GROUPS),
    "unequal": layer_of(nn.Conv2d(6, 5, 3, padding=(2, 0), dilation=2), 6, 8, GROUPS),
    "grouped": layer_of(nn.Conv2d(6, 4, 3, groups=2), 8, 6, (3, 40)),
    "one_group": layer_of(nn.Conv2d(6, 5, 1), 8, 8, (7, 7)),
    "wide_conv": layer_of(nn.Conv2d(6, 5, 3, padding=1), 15, 16, (700, 40000)),
    "linear": layer_of(
        nn.Linear(8, 7),
        4,
        8,
        GROUPS,
        smoothing=POWERS,
        shift=random(8),
        bias_correction=random(2, 7),
    ),
    "rotated": layer_of(
        *(nn.Linear(8, 7), 4, 8, GROUPS), smoothing=POWERS, rotation=torch.tensor([4])
    ),
    "wide_input": layer_of(nn.Linear(8, 7), 8, 16, (700, 40000)),
    "odd_input": layer_of(nn.Linear(8, 7), 8, 12, (700, 900)),
    "wide_weight": layer_of(nn.Linear(8, 7, bias=False), 15, 8, GROUPS),
    "by_name": layer_of(nn.Conv2d(6, 5, 3, padding="same"), 8, 8, GROUPS),
}
for constant in ("one_group", "wide_conv", "wide_input"):
    LAYERS[constant].input_scale[:] = LAYERS[constant].input_scale[0]
CPUS = [True] if onednn.saturates() else [True, False]
"""Whether a graph is for any CPU; those for VNNI alone cannot be tried without."""


def products(any_cpu: bool) -> int:
    """Of bytes, in all layers but the one that cannot be computed in integers."""
    layers = [layer for name, layer in LAYERS.items() if name != "by_name"]
    return sum(
        len(weights_of(layer, any_cpu)) * (1 + (layer.activation_bits > 8)) for layer in layers
    )


class Side(nn.Module):
    """All layers side by side on one input: what one of them does reaches no other."""

    def __init__(self) -> None:
        super().__init__()
        self.step = StepState()
        self.layers = nn.ModuleDict(LAYERS)
        for layer in LAYERS.values():
            layer.step, layer.compute = self.step, simulate
        tables = {}
        for name in ATTENTION_OPERANDS:
            tops = torch.tensor([3.0, 2.0])
            qparams = choose_qparams(-tops / 2, tops, activation_spec(8))
            tables[f"{name}_scale"], tables[f"{name}_zero_point"] = qparams
        self.attention = QuantizedAttnProcessor(tables, 8, 8, self.step, 0.3, qk_norm=True)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> SimpleNamespace:
        outputs = [layer(x) for layer in self.layers.values()]
        outputs.append(self.attention.products(x, x.flip(1), x.flip(2), mask))
        return SimpleNamespace(sample=torch.cat([y.flatten(1) for y in outputs], 1))


@pytest.fixture(scope="module")
def traced():
    """The graph, its parts, inputs, and what the simulation says of them by timestep."""
    module = Side()
    x, mask = random(3, 6, 9, 8), random(3, 1, 9, 9)
    said = {}
    for group, timestep in enumerate((999.0, 1.0)):
        module.step.group = group
        said[timestep] = module(x, torch.full((3,), timestep), mask).sample
    graph = onnx_graph.trace(module, module.step, BOUNDS, own_signature(x, {"mask": mask}))
    inputs = {"sample": x, "mask": mask}
    return graph, dict(module.named_modules()), inputs, said


def check(session, inputs, said) -> None:
    """Rows are tested one by one too: their number is open."""
    products = 6 * 9 * 8  # the last values are those of attention
    for timestep, expected in said.items():
        for rows in (3, 1):
            cut = {name: value[:rows] for name, value in inputs.items()}
            found = session.run({**cut, "timestep": torch.full((rows,), timestep)})
            expected = expected[:rows]
            assert relative(found[:, :-products], expected[:, :-products]) < 1e-5
            assert relative(found[:, -products:], expected[:, -products:]) < 1e-5


@pytest.mark.parametrize("any_cpu", CPUS)
def test_onnx_runtime_computes_every_product_in_integers(tmp_path, traced, any_cpu):
    graph, parts, inputs, said = traced
    path = tmp_path / "denoiser.onnx"
    onnx_graph.save(onnx_graph.spell_out(graph, parts, Form.INTEGER, any_cpu=any_cpu), path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = runtimes.onnx_session(path)
    check(session, inputs, said)
    assert session.integer == products(any_cpu) + 2  # two of attention
    assert session.floating == 1  # the convolution padded by name


@pytest.mark.parametrize("any_cpu", CPUS)
def test_openvino_computes_every_layer_in_integers(tmp_path, traced, any_cpu):
    graph, parts, inputs, said = traced
    source, path = tmp_path / "denoiser.onnx", tmp_path / "denoiser.xml"
    onnx_graph.save(onnx_graph.spell_out(graph, parts, Form.FAKE, any_cpu=any_cpu), source)
    onnx.checker.check_model(onnx.load(source), full_check=True)
    runtimes.onnx_to_openvino(source, path)
    session = runtimes.openvino_session(path)
    check(session, inputs, said)
    assert session.integer == products(any_cpu)
    assert session.floating >= 1  # that convolution; attention may be one operator of its own


def test_large_weights_go_to_a_file_of_their_own(tmp_path, traced, monkeypatch):
    graph, parts, inputs, said = traced
    monkeypatch.setattr(onnx_graph, "LARGEST", 100)
    path = tmp_path / "denoiser.onnx"
    onnx_graph.save(onnx_graph.spell_out(graph, parts, Form.INTEGER, any_cpu=True), path)
    assert (tmp_path / "denoiser.onnx.data").is_file()
    check(runtimes.onnx_session(path), inputs, said)
