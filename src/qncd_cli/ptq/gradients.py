"""Gradients of many tensors in one pass back, each used when it comes and given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn


@contextmanager
def own_inputs(denoiser: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, each named layer reads its input as a view of its own, kept by name.

    Gradients in a view are those through that layer alone: q, k and v read one tensor, and so do
    a shortcut and the normalization beside it.
    """
    inputs: dict[str, Tensor] = {}
    handles = []
    try:
        for name in names:

            def hook(module, args, name=name):
                if not args[0].requires_grad:
                    return None
                inputs[name] = args[0].view_as(args[0])
                return inputs[name], *args[1:]

            handles.append(denoiser.get_submodule(name).register_forward_pre_hook(hook))
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gradients(
    tensors: Mapping[str, Tensor], receive: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Within the block, the gradient of each tensor is received in a pass back, and given up."""
    handles = []

    def receive_leaf(tensor: Tensor, name: str) -> None:
        assert tensor.grad is not None
        receive(name, tensor.grad)
        tensor.grad = None

    for name, tensor in tensors.items():
        if tensor.is_leaf:
            hook = partial(receive_leaf, name=name)
            handles.append(tensor.register_post_accumulate_grad_hook(hook))
        else:
            handles.append(tensor.register_hook(partial(receive, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def other_leaves(output: Tensor, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """What else an output has a gradient for: the latents, tables of the condition."""
    known, found = {id(weight) for weight in weights.values()}, []
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            found.append(leaf)
    return found


class Remembered:
    """Tensors by name, each made when it is asked for, and kept while all fit into some bytes."""

    def __init__(self, limit: int, make: Mapping[str, Callable[[], Tensor]]):
        self._room, self._make = limit, make
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        made = self._make[name]()
        if made.nbytes <= self._room:
            self._kept[name] = made
            self._room -= made.nbytes
        return made
