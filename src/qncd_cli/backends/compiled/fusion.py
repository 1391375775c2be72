"""Fusion: how a traced graph changes before it is compiled.

Quantization of a layer's input is joined with what comes before it, in one of the operators of
kernels/, where that is faster than the compiler's own code: norms and what belongs to them,
concatenated images, gated linear units. Everything else is opened for the compiler.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from .group_norm import group_norm
from .ops import (
    CODES,
    GATED_CODES,
    GATED_PRODUCT_CODES,
    GROUP_NORM,
    IMAGE_CODES,
    MULTIPLY,
    codes,
    layer_of,
)
from .upsampled_conv import doubles

_aten = torch.ops.aten
TYPES = (torch.float32, torch.bfloat16)
"""Types of inputs that the operators take."""
PRODUCT = 7
"""Operands of multiply but the last, which only images have."""
_NO_NORM = (None, None, None, None, None, 1, 0.0, False)
"""Operands of image_codes from the embedding to silu."""


def fused(program: ExportedProgram) -> ExportedProgram:
    """The program with its operators joined where they can be, and the others opened."""
    graph = program.graph_module.graph
    for node in calls_of(MULTIPLY, graph):
        _double_later(node)
    _quantize_once(graph)
    for node in calls_of(CODES, graph):
        _join(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    opened: dict[Any, Any] = {CODES: codes, GROUP_NORM: group_norm}
    return program.run_decompositions(opened)


# ------------------------------------------------------------------ what is rewritten


def _double_later(node: Node) -> None:
    """Turn a convolution of an image with doubled pixels into one of the image as it is.

    Doubling and quantization change places: fewer values are quantized and fewer products made.
    """
    low, high, *others, key, dtype = operands_of(node)
    quantized = low.args[0] if is_call(low, operator.getitem) else None
    if not is_call(quantized, CODES):
        return
    image, *quantizer = operands_of(quantized)
    if not _doubles_pixels(image) or not doubles(layer_of(key)):
        return
    graph = node.graph
    with graph.inserting_before(quantized):
        small = graph.call_function(CODES, (_in_any_order(image.args[0]), *quantizer))
        low = graph.call_function(operator.getitem, (small, 0))
        high = None if high is None else graph.call_function(operator.getitem, (small, 1))
    replace(node, MULTIPLY, (low, high, *others, key, dtype, True))


def _quantize_once(graph: Graph) -> None:
    """Layers that quantize one input alike share its codes."""
    first: dict[tuple[Any, ...], Node] = {}
    for node in calls_of(CODES, graph):
        kept = first.setdefault(operands_of(node), node)
        if kept is not node:
            node.replace_all_uses_with(kept)


def _join(node: Node) -> None:
    """Quantization with what comes before it, where an operator does both."""
    x, image, *quantizer = operands_of(node)
    if x.meta["val"].dtype not in TYPES:
        return
    if not image:
        halves = _gated(x)
        if halves is not None:
            _join_gated(node, halves, quantizer)
        return
    found = _normed(x)
    if found is None and _concatenates(x):
        found = x, _NO_NORM
    if found is not None:
        x, before = found
        parts = list(x.args[0]) if _concatenates(x) else [x]
        replace(node, IMAGE_CODES, (parts, *before, *quantizer))


def _join_gated(node: Node, halves: Node, quantizer: list[Any]) -> None:
    """The gate with the product before it, where nothing else needs that."""
    if is_call(halves, MULTIPLY) and len(halves.users) == 1 and len(operands_of(halves)) == PRODUCT:
        replace(node, GATED_PRODUCT_CODES, (*operands_of(halves), *quantizer))
    else:
        replace(node, GATED_CODES, (halves, *quantizer))


def _gated(x: Any) -> Any:
    """The tensor whose first half times gelu of whose second x is; None for anything else."""
    x = _through_dropout(x)
    if not is_call(x, _aten.mul.Tensor):
        return None
    first, gelu = x.args
    if not is_call(gelu, _aten.gelu.default) or gelu.kwargs or len(gelu.args) > 1:
        return None
    second = gelu.args[0]
    if not (is_call(first, operator.getitem) and is_call(second, operator.getitem)):
        return None
    halves = first.args[0]
    cut = is_call(halves, _aten.chunk.default) and halves.args[1:] == (2, -1)
    ordered = first.args == (halves, 0) and second.args == (halves, 1)
    return halves.args[0] if cut and ordered else None


def _normed(y: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """y = silu(GN(x + embedding) * multiplier + addend), all but GN optional: x and the operands of
    image_codes from the embedding to silu. None where there is no norm."""
    y = _through_dropout(y)
    silu = is_call(y, _aten.silu.default)
    if silu:
        y = _through_dropout(y.args[0])
    multiplier, addend = None, None
    if not is_call(y, GROUP_NORM):
        y, addend = without(_aten.add.Tensor, y)
        y, multiplier = without(_aten.mul.Tensor, y)
        if not is_call(y, GROUP_NORM):
            return None
    x, weight, bias, *form = y.args
    x, embedding = without(_aten.add.Tensor, x)
    return x, (embedding, weight, bias, multiplier, addend, *form, silu)


# ------------------------------------------------------------------ what is found


def calls_of(target: Any, graph: Graph) -> list[Node]:
    """The nodes that call an operator, in order."""
    return [node for node in graph.nodes if node.target is target]


def is_call(node: Any, target: Any) -> bool:
    """Whether it is a node that calls that operator."""
    return isinstance(node, Node) and node.target is target


def operands_of(node: Any) -> tuple[Any, ...]:
    """What a node's operator is called with, by position."""
    return tuple(node.args)


def replace(node: Node, target: Any, operands: tuple[Any, ...]) -> None:
    """Another operator in the place of a node."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, operands)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)


def _through_dropout(node: Any) -> Any:
    """Without dropout, which does nothing outside of training."""
    while is_call(node, _aten.dropout.default) and not node.args[2]:
        node = node.args[0]
    return node


def _in_any_order(image: Any) -> Any:
    """Without what only puts it in order in memory."""
    while is_call(image, _aten.contiguous.default):
        image = image.args[0]
    return image


def _concatenates(image: Any) -> bool:
    """Whether images are concatenated along their channels."""
    return is_call(image, _aten.cat.default) and image.args[1:] == (1,)


def _doubles_pixels(image: Any) -> bool:
    nearest = is_call(image, _aten.upsample_nearest2d.vec)
    return nearest and image.args[1] is None and list(image.args[2]) == [2.0, 2.0]


def without(operation: Any, x: Any) -> tuple[Any, Any]:
    """x = operation(rest, the same at every position: [N, C, 1, 1]) -> both; else x and None."""
    if not is_call(x, operation) or x.kwargs:
        return x, None
    if not all(isinstance(part, Node) for part in x.args):
        return x, None
    rest, same = x.args
    shape, form = rest.meta["val"].shape, same.meta["val"].shape
    return (rest, same) if [*shape[:2], 1, 1] == [*form] else (x, None)
