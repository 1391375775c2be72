"""Timing of the benchmark: rows and microbenchmarks in turn, and what that says of each row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..backends.roofline import microbenchmarks
from ..progress import Track, no_progress
from .row import BASELINE, Row


def time_rows(
    rows: Sequence[Row], calls: Mapping[str, Callable], rounds: int, track: Track
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every round by row, and the best operations per second by kind of arithmetic."""
    known = {kind: microbenchmarks(kind) for kind in {row.arithmetic: None for row in rows}}
    peaks = {peak.name: peak.call for found in known.values() for peak in found}
    for call in peaks.values():
        call()
    seconds = time_in_turn({**calls, **peaks}, rounds, track)
    rates = {
        kind: max(peak.operations / min(seconds[peak.name]) for peak in found)
        for kind, found in known.items()
    }
    return {name: seconds[name] for name in calls}, rates


def time_in_turn(
    calls: Mapping[str, Callable], rounds: int, track: Track = no_progress
) -> dict[str, list[float]]:
    """Seconds of each call in every round; a round makes all calls once, in their order."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in track(range(rounds), "timing all rows", rounds, "rounds"):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def timings(
    rows: Sequence[Row],
    timed: Mapping[str, Sequence[float]],
    rates: Mapping[str, float],
    operations: int,
) -> list[dict[str, Any]]:
    """The part of every row that time decides.

    operations: multiplications and additions of one call.
    """
    medians = {name: statistics.median(seconds) for name, seconds in timed.items()}
    baseline = medians.get(BASELINE)
    table = []
    for row in rows:
        median = medians[row.name]
        table.append(
            {
                "name": row.name,
                "seconds_per_call": median,
                "spread": spread(timed[row.name]),
                "seconds": list(timed[row.name]),
                "speedup": None if baseline is None else baseline / median,
                "operations_per_second": operations / median,
                "roofline": operations / median / rates[row.arithmetic],
                "arithmetic": row.arithmetic,
                "dtype": row.dtype,
            }
        )
    return table


def spread(seconds: Sequence[float]) -> float:
    """Third quartile less the first, in seconds; 0 for a single value."""
    if len(seconds) < 2:
        return 0.0
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return third - first
