"""A denoiser as one graph, whose norms and quantizations are joined: fewer passes over memory.

The layers are traced (torch.export) as their operators. Group norm with SiLU, and layer norm with
modulation, disappear into the quantization behind them; a layer whose output only another layer
reads writes that one's codes at once. The norms' sums are in another order than torch's, which
moves some codes by one: such a graph is made only where it is asked for. Attention multiplies bytes
where the artifact has 8 bits for all of its operands, else in floating point.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from ...quant.attention import AttentionProducts
from ...quant.layers import QuantizedLayer, StepState
from ..compiled.fusion import calls_of, is_call, operands_of, replace, without
from ..compiled.graph import BATCH_RANGE, Traced
from . import layers
from .ops import BYTE_MATMUL, BYTE_PRODUCT, BYTE_SOFTMAX, BYTES, IMAGE_BYTES, ROW_BYTES

_aten = torch.ops.aten
WORTH_INTEGERS = {"macs": 2**20, "width": 16}
"""Size of one head's product, and its width, from which on attention multiplies bytes. No clock has
chosen it: float32 has a 32nd of the bytes' rate on an A100; smaller products are all launches."""


def fused_graph(
    module: nn.Module, step: StepState, example: tuple[Tensor, Mapping[str, Tensor]]
) -> Callable[..., Any]:
    """The denoiser traced on x [N, ...] and its condition, and fused: called as compiled graphs.

    N: within BATCH_RANGE. Raises whatever torch raises where a model cannot be traced.
    """
    for layer in module.modules():
        if isinstance(layer, QuantizedLayer) and not layers.why_not(layer):
            layers.prepare(layer)  # while a model is traced its weights are not there
    x, condition = example
    batch = {0: torch.export.Dim("batch", min=BATCH_RANGE[0], max=BATCH_RANGE[1])}
    denoiser = Traced(module, step)
    times = torch.zeros(len(x), device=x.device)
    inputs = x, times, denoiser.tables.values[0], dict(condition)
    shapes: tuple[Any, ...] = (batch, batch, {}, dict.fromkeys(condition, batch))
    with warnings.catch_warnings(), torch.no_grad(), _attention_in_bytes(module):
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(denoiser, inputs, dynamic_shapes=shapes, strict=False)
        finally:
            step.traced = None
        graph_module = program.module()
    fuse(graph_module.graph)
    graph_module.recompile()
    return graph_module


@contextmanager
def _attention_in_bytes(module: nn.Module) -> Iterator[None]:
    """In this block attention's products are the kernel's."""
    products = [m for m in module.modules() if isinstance(m, AttentionProducts)]
    before = [(part, part.matmul, part.softmax_codes, part.worth) for part in products]
    try:
        for part in products:
            part.matmul, part.worth = BYTE_MATMUL, WORTH_INTEGERS
            part.softmax_codes = BYTE_SOFTMAX
        yield
    finally:
        for part, matmul, softmax_codes, worth in before:
            part.matmul, part.softmax_codes, part.worth = matmul, softmax_codes, worth


def fuse(graph: Graph) -> None:
    """Join what can be joined."""
    _drop_idle(graph)
    for node in calls_of(BYTES, graph):
        if node.args[1]:
            _join_group_norm(node)
        else:
            _join_layer_norm(node)
    for node in calls_of(BYTES, graph):
        _write_codes(node)
    graph.eliminate_dead_code()


def _drop_idle(graph: Graph) -> None:
    """Take out conversions to the type that a tensor has, dropout, which does nothing outside of
    training, and checks of what was traced."""
    for node in calls_of(_aten._assert_tensor_metadata.default, graph):
        graph.erase_node(node)
    for node in calls_of(_aten.to.dtype, graph):
        x, *kind = operands_of(node)
        if kind == [x.meta["val"].dtype]:
            node.replace_all_uses_with(x)
            graph.erase_node(node)
    for node in calls_of(_aten.dropout.default, graph):
        if not node.args[2]:
            node.replace_all_uses_with(operands_of(node)[0])
            graph.erase_node(node)


def _join_group_norm(node: Node) -> None:
    x, _, *quantizer = operands_of(node)
    y: Any = x
    silu = is_call(y, _aten.silu.default)
    if silu:
        y = y.args[0]
    if not is_call(y, _aten.group_norm.default) or y.args[2] is None:
        return
    image, groups, weight, bias, *eps = operands_of(y)
    image, embedding = without(_aten.add.Tensor, image)
    if embedding is not None and _type(embedding) != _type(image):
        return
    if embedding is not None:
        with node.graph.inserting_before(node):
            embedding = node.graph.call_function(_aten.flatten.using_ints, (embedding, 1))
    norm = embedding, weight, bias, groups, eps[0] if eps else 1e-5, silu
    replace(node, IMAGE_BYTES, (image, *norm, *quantizer))


def _join_layer_norm(node: Node) -> None:
    x, _, *quantizer = operands_of(node)
    y, multiplier, addend = x, None, None
    if is_call(y, _aten.add.Tensor):
        y, addend = _modulated(_aten.add.Tensor, y)
        y, multiplier = _modulated(_aten.mul.Tensor, y)
        if addend is None or multiplier is None:
            return
        if not _type(multiplier) == _type(addend) == _type(y):
            return
    if not is_call(y, _aten.layer_norm.default):
        return
    left_out: tuple[Any, ...] = (None, None, 1e-5)
    rows, shape, weight, bias, eps, *_ = [*operands_of(y), *left_out[len(y.args) - 2 :]]
    if rows.meta["val"].ndim != 3 or len(shape) != 1 or (weight is None) is not (bias is None):
        return
    if multiplier is not None:
        with node.graph.inserting_before(node):
            multiplier, addend = (
                node.graph.call_function(_aten.squeeze.dim, (part, 1))
                for part in (multiplier, addend)
            )
    replace(node, ROW_BYTES, (rows, weight, bias, multiplier, addend, eps, *quantizer))


def _type(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def _modulated(operation: Any, x: Any) -> tuple[Any, Any]:
    """x = operation(rest [N, L, C], the same for all rows of an image [N, 1, C]) -> both."""
    if not is_call(x, operation) or x.kwargs or not all(isinstance(p, Node) for p in x.args):
        return x, None
    for rest, same in (x.args, x.args[::-1]):
        shape, form = rest.meta["val"].shape, same.meta["val"].shape
        if len(shape) == 3 and [shape[0], 1, shape[2]] == [*form]:
            return rest, same
    return x, None


def _write_codes(node: Node) -> None:
    """A product whose output nobody but this quantization reads writes the codes itself."""
    x, image, *quantizer = operands_of(node)
    y = x
    if image:
        if not is_call(y, _aten.permute.default) or list(y.args[1]) != [0, 3, 1, 2]:
            return
        if len(y.users) > 1:
            return
        y = y.args[0]
    if not is_call(y, BYTE_PRODUCT) or len(y.users) > 1 or quantizer[-1] > 8:
        return
    names = ("factor", "shift", "scale", "zero_point", "bits")
    following = {f"next_{name}": value for name, value in zip(names, quantizer, strict=True)}
    with node.graph.inserting_before(node):
        codes = node.graph.call_function(BYTE_PRODUCT, y.args, {**y.kwargs, **following})
    codes.meta.update(y.meta)
    for part in [*node.users]:
        if is_call(part, operator.getitem) and part.args[1] == 0:
            part.replace_all_uses_with(codes)
