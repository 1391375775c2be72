"""Layers side by side: where one is too small for several threads, each thread has its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

WIDE = 2048
"""Inputs per output from which on a layer's products and factorisations keep all threads busy, and
two at once would take too much memory. A larger value: more layers side by side."""
AHEAD = 2
"""Layers that are begun before their results are asked for, per thread."""


def is_wide(in_features: int) -> bool:
    """Whether rounding a layer keeps all threads busy by itself."""
    return in_features >= WIDE


def side_by_side(
    layers: Iterable[T], work: Callable[[T], R], alone: Callable[[T], bool] = lambda _: False
) -> Iterator[tuple[T, R]]:
    """Every layer with its result, in order; as many at once as torch has threads.

    Each is worked on by one thread, without gradients, and comes out the same however many there
    are. alone: those that all threads work on together. An error of a layer is raised in its place.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield from ((layer, _without_gradients(work, layer)) for layer in layers)
        return
    begun: deque[tuple[T, Future[R]]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for layer in layers:
            if alone(layer):
                while begun:
                    yield _next(begun)
                yield layer, _without_gradients(work, layer)
                continue
            begun.append((layer, pool.submit(_without_gradients, work, layer)))
            if len(begun) >= AHEAD * threads:
                yield _next(begun)
        while begun:
            yield _next(begun)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # also what threads of torch's own that come later take


def _without_gradients(work: Callable[[T], R], layer: T) -> R:
    """The result of the work; a thread of its own would else record gradients."""
    with torch.no_grad():
        return work(layer)


def _next(begun: deque[tuple[T, Future[R]]]) -> tuple[T, R]:
    layer, result = begun.popleft()
    return layer, result.result()
