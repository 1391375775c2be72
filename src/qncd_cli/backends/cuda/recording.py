"""Recorded launches: a CUDA graph of a denoiser's call for each shape of its inputs.

A call of a small batch is hundreds of launches, each dearer for the CPU than for the GPU. Recorded
once, they are replayed as one. A recording is used only after its replay gave the very bits of the
call itself; whatever cannot be recorded, or differs, is called as before. No GPU has recorded
anything yet: tests put a recorder of the CPU in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(x, timesteps, row of tables, condition) -> prediction, of tensors on one device."""
Inputs = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]

WARMUPS = 2
"""Calls before a recording, in which kernels are compiled and tiles timed."""
MOST = 4
"""Shapes that are recorded, each in memory of its own. A set has two: full batches and a rest."""


@dataclass(frozen=True)
class Recording:
    """inputs: read by a replay; replay: computes output from them anew, in its place."""

    inputs: Inputs
    replay: Callable[[], None]
    output: Tensor

    def __call__(
        self, x: Tensor, t: Tensor, row: Tensor, condition: Mapping[str, Tensor]
    ) -> Tensor:
        """The prediction, in memory that no later call writes to."""
        for mine, given in zip(self.inputs[:3], (x, t, row), strict=True):
            mine.copy_(given)
        for name, mine in self.inputs[3].items():
            mine.copy_(condition[name])
        self.replay()
        return self.output.clone()


Recorder = Callable[[Call, Inputs], tuple[Callable[[], None], Tensor]]
"""(call, inputs) -> replay and output, of a `Recording` with these inputs."""


def record_on_gpu(call: Call, inputs: Inputs) -> tuple[Callable[[], None], Tensor]:
    """A Recorder. Raises RuntimeError where the call does what cannot be recorded."""
    with torch.cuda.device(inputs[0].device):
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                call(*inputs)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call(*inputs)
    return graph.replay, output


class Recorded:
    """A call whose launches are recorded for the first shapes that it meets and then replayed."""

    def __init__(self, call: Call, record: Recorder = record_on_gpu):
        self.call, self.record = call, record
        self._known: dict[object, Recording | None] = {}

    def __call__(
        self, x: Tensor, t: Tensor, row: Tensor, condition: Mapping[str, Tensor]
    ) -> Tensor:
        key = (
            tuple((y.shape, y.dtype) for y in (x, t, row)),
            tuple((name, y.shape, y.dtype) for name, y in sorted(condition.items())),
        )
        if key in self._known:
            known = self._known[key]
            return self.call(x, t, row, condition) if known is None else known(x, t, row, condition)
        expected = self.call(x, t, row, condition)
        if len(self._known) < MOST:
            self._known[key] = self._recorded(x, t, row, condition, expected)
        return expected

    def _recorded(
        self,
        x: Tensor,
        t: Tensor,
        row: Tensor,
        condition: Mapping[str, Tensor],
        expected: Tensor,
    ) -> Recording | None:
        """None where it cannot be recorded, or a replay gives other bits than expected."""
        inputs = x.clone(), t.clone(), row.clone(), {n: y.clone() for n, y in condition.items()}
        try:
            found = Recording(inputs, *self.record(self.call, inputs))
        except RuntimeError:
            return None
        for _ in range(2):
            for left in (inputs[0], found.output):  # what is there already is no answer
                left.zero_()
            if not torch.equal(found(x, t, row, condition), expected):
                return None
        return found
