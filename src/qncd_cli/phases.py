"""Where a stage's time and memory go: its phases, by the progress that it reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .progress import Track
from .resident import forget_peak, peak_resident

T = TypeVar("T")


@dataclass
class Phase:
    """What one phase took; one that ran several times has one sum.

    name: as progress describes it. seconds: without those of phases inside of it. units: how many
    calls, layers or images passed. peak_bytes: the most in memory while it ran, None where the
    system does not tell. layers: seconds by the name of a layer, where a unit is one.
    """

    name: str
    seconds: float = 0.0
    units: int = 0
    peak_bytes: int | None = None
    layers: dict[str, float] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """A JSON object; layers: the slowest first."""
        slowest = sorted(self.layers.items(), key=lambda item: -item[1])
        return {
            "name": self.name,
            "seconds": round(self.seconds, 3),
            "units": self.units,
            "peak_bytes": self.peak_bytes,
            "layers": {name: round(seconds, 3) for name, seconds in slowest},
        }


class Phases:
    """Records the phases of what is tracked through `track`, in the order in which they began.

    inner: who shows the progress; clock: seconds, of any zero.
    """

    def __init__(self, inner: Track, clock: Callable[[], float] = time.perf_counter):
        self._inner, self._clock = inner, clock
        self._found: dict[str, Phase] = {}
        self._open: list[Phase] = []
        self._since = clock()

    @property
    def found(self) -> list[Phase]:
        return list(self._found.values())

    def track(
        self, items: Iterable[T], description: str, total: int, unit: str
    ) -> Generator[T, None, None]:
        """A Track: that of `inner`, measured."""
        phase = self._found.setdefault(description, Phase(description))
        self._pass()
        self._open.append(phase)
        try:
            for item in self._inner(items, description, total, unit):
                begun = self._clock()
                yield item
                phase.units += 1
                if (name := _layer(item)) is not None:
                    phase.layers[name] = phase.layers.get(name, 0.0) + self._clock() - begun
        finally:
            self._pass()
            self._open.remove(phase)

    def _pass(self) -> None:
        """Give the time since the last change to the innermost open phase, and the peak to all."""
        now = self._clock()
        peak = peak_resident()
        if self._open:
            self._open[-1].seconds += now - self._since
        for phase in self._open if peak is not None else []:
            phase.peak_bytes = max(phase.peak_bytes or 0, peak or 0)
        if not forget_peak():
            for phase in self._open:
                phase.peak_bytes = None
        self._since = now


def _layer(item: object) -> str | None:
    """The name of the layer that a unit of work is about, if it is about one."""
    first = item[0] if isinstance(item, tuple) and item else item
    name = getattr(first, "name", None)
    return name if isinstance(name, str) else None
