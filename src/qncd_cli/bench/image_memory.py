"""Memory that drawing a row's images takes, in a process that has done nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from ..resident import forget_peak, peak_resident

Peaks = Mapping[int, int | None]
"""Bytes at most by batch size."""


def alone(measure: Callable[..., Peaks], *arguments: Any) -> Peaks:
    """What measure(*arguments) gives in a process of its own; {} where that is killed."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(measure, *arguments).result()
    except BrokenProcessPool:
        return {}


def peaks_of(draw: Callable[[int], object], batches: Sequence[int], before: int | None) -> Peaks:
    """The most that drawing a batch of each size holds beyond `before`, the smallest first; None
    where the system tells none."""
    found: dict[int, int | None] = {}
    for batch in sorted(batches):
        known = forget_peak()
        draw(batch)
        peak = peak_resident() if known else None
        found[batch] = None if before is None or peak is None else peak - before
    return found
