"""The profile of a denoiser call: where its time goes.

Every operator counts for the innermost module around it that says what kind of work it is:
quantized layer, float layer, attention, norm or activation function. The rest is residual
additions, embeddings, concatenations and Python. A compiled graph has no modules: besides integer
kernels and attention all of it is one kind, norms, activation functions and quantization.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from ..quant.layers import CachedTimestepLayer, QuantizedLayer

KINDS = (
    "integer kernels",
    "quantize and copy",
    "float layers",
    "attention products",
    "norms and activations",
    "compiled code",
    "rest",
)
_RANGE = "qncd: "
_CALL = f"{_RANGE}call"
_INTEGER_KERNEL = "onednn::q"
_ATTENTION = ("qncd::attention", "qncd::byte_attention", "qncd::matmul")
"""Operators of graphs."""
_ACTIVATIONS = ("SiLU", "GELU", "GEGLU", "ApproximateGELU", "SwiGLU", "Mish", "ReLU")


def profile_calls(module: nn.Module, call: Callable[[], Tensor], calls: int = 3) -> dict[str, Any]:
    """Mean time of a call in seconds, and the share of each of KINDS in it; adds up to 1.

    module: what call runs, already prepared. Only the calling thread is recorded: an operator
    that uses more threads counts with the time that it takes.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler would write to stderr
    spent = dict.fromkeys(KINDS, 0.0)
    with _ranges(module), profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(calls):
            with record_function(_CALL):
                call()
    events = recorded.events()
    kind_of = _kind_of if any(_is_module(event) for event in events) else _kind_in_graph
    for event in events:
        spent[kind_of(event)] += event.self_cpu_time_total
    total = sum(spent.values())
    return {
        "seconds_per_call": total / calls / 1e6,
        "shares": {kind: value / total for kind, value in spent.items()},
    }


def _is_module(event: Any) -> bool:
    return bool(event.name.startswith(_RANGE) and event.name != _CALL)


def _kind_of(event: Any) -> str:
    if event.name.startswith(_INTEGER_KERNEL):
        return "integer kernels"
    if event.name.startswith(_RANGE):
        return "rest"  # what is left of a range without its operators is Python
    around = event.cpu_parent
    while around is not None and not _is_module(around):
        around = around.cpu_parent
    return "rest" if around is None else around.name.removeprefix(_RANGE)


def _kind_in_graph(event: Any) -> str:
    if event.name.startswith(_INTEGER_KERNEL):
        return "integer kernels"
    around = event
    while around is not None and around.name not in _ATTENTION:
        around = around.cpu_parent
    return "compiled code" if around is None else "attention products"


def _range_of(module: nn.Module) -> str | None:
    """The kind of work that a module does itself, by name; None: it only calls others."""
    name = type(module).__name__
    if isinstance(module, QuantizedLayer):
        return "quantize and copy"
    if isinstance(module, nn.Conv2d | nn.Linear):
        return "float layers"
    if isinstance(module, CachedTimestepLayer):
        return "rest"
    if name == "Attention":
        return "attention products"
    return "norms and activations" if "Norm" in name or name in _ACTIVATIONS else None


@contextmanager
def _ranges(module: nn.Module) -> Iterator[None]:
    """Within the block, the profiler sees which kind of module is running."""
    handles, running = [], []

    def enter(kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            running.append(record_function(_RANGE + kind))
            running[-1].__enter__()

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop().__exit__(None, None, None)

    try:
        for part in module.modules():
            kind = _range_of(part)
            if kind is not None:
                handles.append(part.register_forward_pre_hook(enter(kind)))
                handles.append(part.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
