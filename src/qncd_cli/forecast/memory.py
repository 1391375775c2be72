"""Forecast of memory: the stages, phase by phase: the model, artifacts, what each part adds.

Artifacts are forecast by a module beside this one; the stages say what their parts cost.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from ..models.loading import FIRST_STAGES
from ..ptq.cost import Cost
from ..stages import calibrate, quantize
from ..store.artifacts import Artifact
from .shapes import Shapes

LOADING = "loading the model"
"""The phase in which nothing of a mapped file has been read yet."""
KERNELS = 70e6
"""Bytes of kernels that oneDNN compiles for the shapes it meets, and of threads. Fitted to
fashion-ldm and LDM-4 (docs/notebook/2026-11-23-plan-and-peak-memory.md)."""


@dataclass(frozen=True)
class Foreseen:
    """The artifacts of a run, in bytes of their tensors."""

    calibration: int
    smoothing: int
    quantized: int

    @classmethod
    def of(cls, calibration: Artifact, smoothing: Artifact, quantized: Artifact) -> Foreseen:
        sizes = (
            sum(t.nbytes for t in a.tensors.values()) for a in (calibration, smoothing, quantized)
        )
        return cls(*sizes)


def resident(shapes: Shapes, dtype: torch.dtype, left_out: Collection[str] = ()) -> int:
    """The loaded model, with what of it is mapped: the first stage in float32, the rest in the
    configured type."""
    size = dtype.itemsize
    return sum(
        part.parameters * (4 if name in FIRST_STAGES else size)
        for name, part in shapes.parts.items()
        if part.stays and name not in left_out
    )


def loading(shapes: Shapes) -> int:
    """Bytes while the model loads: every component that is not mapped, and the largest one's file.

    Folders are read in the type that they are used in, first stages and other sources in float32.
    """
    parts = {name: part for name, part in shapes.parts.items() if not part.mapped}
    size = shapes.dtype.itemsize if shapes.is_folder else 4
    loaded = sum((4 if n in FIRST_STAGES else size) * p.parameters for n, p in parts.items())
    return loaded + max((part.stored for part in parts.values()), default=0)


def mapped(shapes: Shapes, left_out: Collection[str] = ()) -> int:
    """Bytes of the loaded model that are pages of its files.

    Once read they count as this process' memory, but the system gives them up where memory is
    short, and reads them again.
    """
    parts = shapes.parts.items()
    return sum(p.stored for name, p in parts if p.mapped and p.stays and name not in left_out)


def calibrate_phases(
    shapes: Shapes, held: int, sizes: Foreseen, costs: dict[str, Cost]
) -> dict[str, float]:
    """Bytes by phase, without imports. held: the loaded model; costs: of stages.calibrate."""
    phases = {LOADING: float(loading(shapes))}
    for name, cost in costs.items():
        calibration = sizes.calibration if name == calibrate.TRAJECTORIES else 0
        phases[name] = held + calibration + cost.bytes
    return phases


def quantize_phases(
    shapes: Shapes, held: int, sizes: Foreseen, costs: dict[str, Cost]
) -> dict[str, float]:
    """Bytes by phase, without imports. held: the loaded model; costs: of stages.quantize."""
    held = held + sizes.calibration + sizes.smoothing
    phases = {
        LOADING: float(loading(shapes)),
        "reading the calibration": held + float(sizes.calibration),
    }
    for name, cost in costs.items():
        if name == quantize.ROUNDING:
            held += sizes.quantized
        if cost.bytes:
            phases[name] = held + cost.bytes
        held += cost.kept
    return phases


def sample_phases(
    shapes: Shapes, rest: int, sizes: Foreseen, weights: float, costs: dict[str, Cost]
) -> dict[str, float]:
    """Bytes by phase, without imports. rest: the loaded model without its denoiser, whose weights
    are freed, but not the pages of a file; weights: of the quantized denoiser as they are kept;
    costs: of stages.sample."""
    held = rest + sizes.quantized + round(weights)
    phases = {LOADING: float(loading(shapes) + sizes.quantized)}
    return phases | {name: held + cost.bytes for name, cost in costs.items()}
