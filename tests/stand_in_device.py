"""A device that is not the CPU: its tensors mix with the CPU's as little as a GPU's do.

What is computed there is computed on the CPU: numbers are real, and what a GPU would refuse because
tensors lie on two devices is refused here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
"""The one type that is everywhere and can be differentiated on; here its tensors have content."""
_aten = torch.ops.aten
MOVES = {_aten._to_copy.default, _aten.copy_.default}
"""Operators that take tensors of two devices."""


class OnDevice(Tensor):
    """A tensor there. inner: its content, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        form = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        form |= {"dtype": inner.dtype, "device": DEVICE, "requires_grad": inner.requires_grad}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, **form)
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class StandInDevice(TorchDispatchMode):
    """In its block tensors can be made on the device, and moved there and back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, OnDevice)]
    here = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim]
    if func is _aten.index.Tensor and isinstance(args[0], OnDevice):
        here = []  # indices may lie on the CPU
    if there and here and func not in MOVES:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    target = kwargs.get("device")
    result_there = bool(there) if target is None else torch.device(target).type == DEVICE.type
    if func is _aten.copy_.default:
        result_there = isinstance(args[0], OnDevice)
    inner_args, inner_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
    if target is not None:
        inner_kwargs["device"] = torch.device("cpu")
    found = func(*inner_args, **inner_kwargs)
    if not result_there:
        return found
    wrapped = tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x
