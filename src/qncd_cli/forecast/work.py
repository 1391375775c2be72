"""Forecast of work: how much the stages compute, and roughly how long that takes.

It counts the calls of the denoiser and those steps of rounding that grow faster than the weights,
as each part tells (`ptq.cost`). Their time follows from rates measured on this machine: a rough
estimate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..backends.roofline import FLOAT_TYPES, microbenchmarks
from ..ptq.cost import Cost

EFFICIENCY = 0.6
"""Share of the best rate of one large product that a whole denoiser reaches; larger: shorter
forecasts (docs/notebook/2026-11-23-ldm4-speed.md: LDM-4 0.49 to 0.76, by machine and run)."""
RATE_SECONDS = 0.3
"""Seconds that each rate of the machine is measured; longer: a steadier forecast."""
ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Rates:
    """Operations per second of this machine in float32; model_macs: in the model's own type."""

    macs: float
    elements: float
    model_macs: float

    def seconds(self, costs: Iterable[Cost]) -> float:
        """Time of all of them, one after the other."""
        whole = list(costs)
        macs, in_type = sum(c.macs for c in whole), sum(c.model_macs for c in whole)
        computing = (macs / self.macs + in_type / self.model_macs) / EFFICIENCY
        return computing + sum(c.passes for c in whole) / self.elements


Clock = Callable[[], float]


def measured_rates(dtype: str = "float32", clock: Clock = time.perf_counter) -> Rates:
    """Each is measured in well under a second.

    dtype: of the model; float16, in which a CPU does not compute, counts as float32. clock:
    time.process_time gives those of one thread where other work shares the machine.
    """
    macs = _products("float32", clock)
    in_type = _products(dtype, clock) if dtype in {*FLOAT_TYPES} - {"float32"} else macs
    x = torch.ones(ELEMENTS)
    return Rates(macs, ELEMENTS / _fastest(lambda: x * 2.0, clock), in_type)


def _products(dtype: str, clock: Clock) -> float:
    """Multiply-accumulates per second of the faster of two large products."""
    products = microbenchmarks(dtype)
    return max(p.operations / 2 / _fastest(p.call, clock) for p in products)


def _fastest(call: Callable[[], Any], clock: Clock) -> float:
    """Seconds of the fastest of the calls within RATE_SECONDS, the first left out."""
    call()
    best, end = float("inf"), clock() + RATE_SECONDS
    while clock() < end or best == float("inf"):
        start = clock()
        call()
        best = min(best, clock() - start)
    return best
