"""Forecast of work: how much the stages compute, and roughly how long that takes.

It counts the calls of the denoiser and those steps of rounding that grow faster than the weights,
as each part tells (`ptq.cost`). Their time follows from two rates measured on this machine: a rough
estimate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..backends.roofline import microbenchmarks
from ..ptq.cost import Cost

EFFICIENCY = 0.6
"""Share of the best rate of one large product that a whole denoiser reaches; larger: shorter
forecasts (docs/notebook/2026-11-23-ldm4-speed.md: LDM-4 0.49 to 0.76, by machine and run)."""
RATE_SECONDS = 0.3
"""Seconds that each rate of the machine is measured; longer: a steadier forecast."""
ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Rates:
    """Operations per second of this machine in float32."""

    macs: float
    elements: float

    def seconds(self, costs: Iterable[Cost]) -> float:
        """Time of all of them, one after the other."""
        whole = list(costs)
        macs, passes = sum(c.macs for c in whole), sum(c.passes for c in whole)
        return macs / (EFFICIENCY * self.macs) + passes / self.elements


Clock = Callable[[], float]


def measured_rates(clock: Clock = time.perf_counter) -> Rates:
    """Each is measured in well under a second.

    clock: time.process_time gives those of one thread where other work shares the machine.
    """
    products = microbenchmarks("float32")
    macs = max(p.operations / 2 / _fastest(p.call, clock) for p in products)
    x = torch.ones(ELEMENTS)
    return Rates(macs, ELEMENTS / _fastest(lambda: x * 2.0, clock))


def _fastest(call: Callable[[], Any], clock: Clock) -> float:
    """Seconds of the fastest of the calls within RATE_SECONDS, the first left out."""
    call()
    best, end = float("inf"), clock() + RATE_SECONDS
    while clock() < end or best == float("inf"):
        start = clock()
        call()
        best = min(best, clock() - start)
    return best
