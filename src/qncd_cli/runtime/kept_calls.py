"""Calls of a denoiser that are kept: what a killed process has computed is not computed again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from torch import Tensor

from ..machine import give_back
from ..store.partial import Partial, Piece, States
from .denoiser import Denoiser, timestep_group

SEEN = "seen"
"""Name of what hooks saw during a call, before a number that keeps its order."""


LONG = 1.0
"""Seconds of a call after which freed memory goes back to the system: from call to call the heap of
a large model grows by pieces between those that live. Less: time for calls of small models."""


class KeptCalls(Denoiser):
    """A denoiser whose calls are pieces of a stage, by the stage's phase and their number.

    A call that is found is not made: hooks in the denoiser do not run. What they see can be kept
    with the call (`saw`, received again by `receive`), or it is part of a state, which holds after
    `replayed` calls: those after them are made again. replayed: None for all that are there.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        kept: Partial,
        phase: str,
        *,
        receive: Callable[[str, Tensor], None] | None = None,
        states: States | None = None,
        replayed: int | None = None,
    ):
        super().__init__(denoiser.module, denoiser.step, denoiser.group_bounds)
        self.kept, self.phase, self.states, self.replayed = kept, phase, states, replayed
        self._receive = receive
        self._seen: dict[str, Tensor] = {}

    def saw(self, name: str, x: Tensor) -> None:
        """Keep, with the call that is being made, what a hook saw."""
        self._seen[f"{SEEN} {len(self._seen):06d} {name}"] = x

    def __call__(self, x: Tensor, t: Tensor | float, condition: Mapping[str, Tensor]) -> Tensor:
        key = f"{self.phase} {self.calls}"
        found = None
        if self.replayed is None or self.calls < self.replayed:
            found = self.kept.take(key)
        if found is not None:
            self.step.timestep = float(t)
            self.step.group = timestep_group(self.step.timestep, self.group_bounds)
            self.calls += 1
            output, seen = found.tensors.pop("output"), found.tensors
        else:
            self._seen = {}
            begun = time.perf_counter()
            made = Piece(tensors={"output": super().__call__(x, t, condition), **self._seen})
            if time.perf_counter() - begun > LONG:
                give_back()
            self.kept.keep(key, made, self.states)
            output, seen = made.tensors["output"], {n: made.tensors[n] for n in self._seen}
        if self._receive is not None:
            for name, value in sorted(seen.items()):
                self._receive(name.split(" ", 2)[2], value)
        return output


def calls_kept(kept: Partial, phase: str, wanted: int) -> bool:
    """Whether the first calls of a phase, so many, were all found."""
    return all(kept.has(f"{phase} {number}") for number in range(wanted))
