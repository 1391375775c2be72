"""Memory of a computation before it is done: live bytes of tensors on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..quant.attention_processors import InsteadOfAttention


class Meter(TorchDispatchMode):
    """Within the block: bytes of the tensors that operators make and somebody still holds.

    live: now; peak: the most since the block began or `restart`. What exists before (parameters)
    and views are not counted, nor what a kernel needs inside itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def restart(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._known:
                self._watch(storage, 0)
        shortcut = _SHORTCUTS.get(func)
        if shortcut is not None and any(isinstance(x, Tensor) and x.is_meta for x in args):
            result = shortcut(func, *args)
        else:
            result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in self._known:
                self._watch(storage, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        self._known[storage._cdata] = size
        self.live += size
        weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)


def _binary(func: Any, a: Any, b: Any) -> Tensor:
    dtype = torch.result_type(a, b)
    if func is torch.ops.aten.div.Tensor and not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    operands = [x for x in (a, b) if isinstance(x, Tensor)]
    shape = torch.broadcast_shapes(*(x.shape for x in operands))
    like = next((x for x in operands if x.shape == shape), None)
    if like is None:
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty_like(like, dtype=dtype, device="meta")


def _unary(func: Any, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


_SHORTCUTS: dict[Any, Callable[..., Tensor]] = {
    **{getattr(torch.ops.aten, n).Tensor: _binary for n in ("add", "sub", "mul", "div")},
    **{getattr(torch.ops.aten, n).default: _unary for n in ("round", "clamp", "silu", "gelu")},
}
"""Operators of plain shape and type; PyTorch's own rules for them take ten times longer."""


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


class _Fused(torch.autograd.Function):
    """Shapes of softmax(q k^T) v by a kernel that never holds the scores, as the CPU's does not."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention of diffusers' processors; on the meta device it would be done in separate steps."""
    return _Fused.apply(query, key, value)


@contextmanager
def metered() -> Iterator[Meter]:
    """A Meter, with attention as the CPU does it."""
    with InsteadOfAttention(_fused), Meter() as meter:
        yield meter


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that a call without gradients holds at once beyond what was there before."""
    with torch.no_grad(), metered() as meter:
        call()
        return meter.peak
