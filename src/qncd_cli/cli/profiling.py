"""--profile: a table of a stage's phases, and one of the layers that took longest."""

from __future__ import annotations

from collections.abc import Sequence

from ..phases import Phase
from ..vocabulary import megabytes
from .console import Console

SLOWEST = 8
"""Layers in the second table."""
OUTSIDE = "imports, files, everything else"


def show(console: Console, phases: Sequence[Phase], seconds: float) -> None:
    """seconds: of the whole command; what no phase took has a row of its own."""
    rows = [
        [p.name, p.seconds, _share(p.seconds, seconds), p.units, _memory(p.peak_bytes)]
        for p in phases
    ]
    outside = max(0.0, seconds - sum(phase.seconds for phase in phases))
    rows.append([OUTSIDE, outside, _share(outside, seconds), "", ""])
    console.table(["phase", "seconds", "share", "units", "peak memory"], rows)
    layers: dict[str, float] = {}
    for phase in phases:
        for name, took in phase.layers.items():
            layers[name] = layers.get(name, 0.0) + took
    slowest = sorted(layers.items(), key=lambda item: -item[1])[:SLOWEST]
    if slowest:
        title = f"slowest of {len(layers)} layers, where a phase goes layer by layer"
        console.table(["layer", "seconds"], slowest, title)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else ""


def _memory(size: int | None) -> str:
    return "" if size is None else megabytes(size)
