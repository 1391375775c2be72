"""Cost: what a part of the method takes, told from shapes before anything is run.

Each part says so in a function `cost` below what it describes; `--plan` adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

HEADROOM = 1.5
"""Times the activations: oneDNN copies a convolution's input and output into orders of its own, and
the allocator keeps what is free. Fitted to fashion-ldm and LDM-4
(docs/notebook/2026-11-23-plan-and-peak-memory.md)."""
UNPACKING_WEIGHTS = 4
"""Int32 copies of a layer's codes while they are unpacked (quant.packing)."""
SIMULATION = 1.5
"""Time of the simulated denoiser over full precision's."""
INTEGERS = 0.5
"""Time of the int8 backend, uncompiled, over full precision's: LDM-4 0.30 and 0.37, fashion-ldm
0.83 (speed in docs/notebook)."""
NARROW_INTEGERS = 0.7
"""The same where only weights of 7 bits are exact, for each part of a weight
(docs/notebook/2026-11-29-without-vnni.md)."""


OBSERVING = 60
"""Passes over a layer's input for what an observer counts of it. Fitted, as other numbers of passes
are, by scripts/plan_times.py (docs/notebook/2026-11-27-effort.md)."""


@dataclass(frozen=True)
class Cost:
    """What a part takes beside what is held before it begins.

    bytes: held at its height, 0 where another part of the stage holds more; kept: bytes of these
    that are held until the stage ends; macs: multiply-accumulates in float32; model_macs: those in
    the model's own type (model.dtype), of calls in full precision; passes: elements that
    element-wise operations read and write; disk: bytes of temporary files; partial: bytes of a
    state among the partial results.
    """

    bytes: float = 0.0
    macs: float = 0.0
    passes: float = 0.0
    model_macs: float = 0.0
    kept: int = 0
    disk: int = 0
    partial: int = 0


@dataclass(frozen=True)
class DenoiserCall:
    """One call of the denoiser by its sizes.

    copies: rows per sample (2 with guidance); steps: calls per trajectory; full, simulated, graph:
    bytes of activations per row: in full precision, simulated, and with all that a backward pass
    needs (0 where none is run; most of it is kept for the way back, which needs no headroom);
    weights: bytes of the simulated denoiser's in float32; largest: elements of the largest weight;
    macs: multiply-accumulates per row; inputs: elements per row that each layer reads; layer_macs:
    of each layer, per row.
    """

    copies: int
    steps: int
    full: float
    simulated: float
    graph: float
    weights: float
    largest: int
    macs: int
    inputs: dict[str, int] = field(default_factory=dict)
    layer_macs: dict[str, int] = field(default_factory=dict)

    def full_bytes(self, rows: int) -> float:
        """What a call in full precision holds."""
        return rows * self.full * HEADROOM

    def first_bytes(self, rows: int) -> float:
        """What the first call of a quantized denoiser holds: activations, and the codes of the
        largest layer on their way to a weight."""
        activations = rows * max(self.full, self.simulated)
        return activations * HEADROOM + UNPACKING_WEIGHTS * 4.0 * self.largest
