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


def measured_rates() -> Rates:
    """Each is measured in well under a second."""
    products = microbenchmarks("float32")
    macs = max(p.operations / 2 / _fastest(p.call) for p in products)
    x = torch.ones(ELEMENTS)
    return Rates(macs, ELEMENTS / _fastest(lambda: x * 2.0))


def _fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of the calls within RATE_SECONDS, the first left out."""
    call()
    best, end = float("inf"), time.perf_counter() + RATE_SECONDS
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
