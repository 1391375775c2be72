"""Forecast of memory: the stages, phase by phase, from what their code holds at once.

Activations are metered, artifacts forecast, both by modules beside this one.
What the operators need inside themselves is not metered; HEADROOM stands for it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from ..config.schema import Config
from ..machine import keeps
from ..models.loading import FIRST_STAGES
from ..models.topology import reconstruction_blocks, skip_boundaries, weight_layers
from ..ptq.extra_bits import ROWS_PER_STEP
from ..ptq.hessians import hessian_groups
from ..ptq.layer_plan import LayerPlan, plan_layers
from ..ptq.learn_block import JUDGED_AT_ONCE
from ..ptq.probes import PROBE_ELEMENTS, PROBE_STEPS, PROBE_TRAJECTORIES
from ..ptq.smoothing_choice import EMBEDDED_CLASSES
from ..spec import FLOAT_BITS
from ..store.artifacts import Artifact
from .activations import Activations
from .artifacts import refined
from .shapes import Shapes

LOADING = "loading the model"
"""The phase in which nothing of a mapped file has been read yet."""
GPTQ_MATRICES = 6.3
"""Matrices of a Hessian's size that GPTQ adds to it at its height (two orderings, dampening, two
factorisations and LAPACK's copy): the most that scripts/gptq_memory.py showed (2,000 inputs)."""
NEAREST_WEIGHTS = 6
"""Float32 copies of a weight while its scale is searched by squared error (quant.rounding)."""
LEARNING_WEIGHTS = 10
"""The same while its rounding is learnt: weight, codes, logits, their gradient, Adam's two moments
and the soft weight's parts."""
UNPACKING_WEIGHTS = 4
"""Int32 copies of a layer's codes while they are unpacked (quant.packing)."""
HEADROOM = 1.5
"""Times the activations: oneDNN copies a convolution's input and output into orders of its own, and
the allocator keeps what is free."""
KERNELS = 70e6
"""Bytes of kernels that oneDNN compiles for the shapes it meets, and of threads. This and HEADROOM
were fitted to fashion-ldm and LDM-4
(docs/notebook/2026-11-23-plan-and-peak-memory.md)."""


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


@dataclass(frozen=True)
class Machine:
    """copies: rows of a denoiser call per sample (2 with guidance); integers: whether samples are
    drawn by the int8 backend."""

    copies: int
    integers: bool


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
    config: Config, shapes: Shapes, held: int, sizes: Foreseen, work: Activations, machine: Machine
) -> dict[str, float]:
    """Bytes by phase, without imports. held: the loaded model."""
    rows = min(config.calibration.batch_size, config.calibration.trajectories) * machine.copies
    phases = {
        LOADING: float(loading(shapes)),
        "trajectories": held + sizes.calibration + rows * work.full * HEADROOM,
    }
    probed = probed_for_smoothing(config, shapes)
    if probed:
        phases["choosing smoothing factors"] = held + _probes(config, probed, work, machine)
    if config.correction.intra in ("embedding", "auto"):
        rows = min(shapes.classes or 1, EMBEDDED_CLASSES)
        phases["timestep embeddings"] = held + rows * work.full * HEADROOM
    return phases


def probed_for_smoothing(config: Config, shapes: Shapes) -> list[LayerPlan]:
    """Layers whose inputs choose_factors looks at."""
    plans = plan_layers(config, shapes.denoiser)
    if config.correction.intra not in ("none", "embedding"):
        return plans
    split = config.quantization.split_skip_connections
    boundaries = skip_boundaries(shapes.denoiser) if split else {}
    return [plan for plan in plans if plan.name in boundaries]


def judged_by_output(config: Config, shapes: Shapes) -> list[LayerPlan]:
    """Layers that stages.quantize keeps probes of."""
    plans = [p for p in plan_layers(config, shapes.denoiser) if not p.stays_float]
    return [p for p in plans if p.observer == "output" or config.quantization.bias_correction]


def probe_rows(config: Config, plan: LayerPlan, work: Activations, machine: Machine) -> int:
    """Rows of a layer's input that collect_probes keeps of one call."""
    called = min(PROBE_TRAJECTORIES, config.calibration.trajectories) * machine.copies
    wanted = max(1, PROBE_ELEMENTS // PROBE_STEPS // work.inputs.get(plan.name, 1))
    return -(-called // max(1, -(-called // wanted)))


def _probes(config: Config, plans: list[LayerPlan], work: Activations, machine: Machine) -> float:
    called = min(PROBE_TRAJECTORIES, config.calibration.trajectories) * machine.copies
    calls = min(PROBE_STEPS, config.sampling.steps)
    kept = sum(
        4 * calls * probe_rows(config, p, work, machine) * work.inputs.get(p.name, 0) for p in plans
    )
    return kept + called * work.full * HEADROOM


def quantize_phases(
    config: Config, shapes: Shapes, held: int, sizes: Foreseen, work: Activations, machine: Machine
) -> dict[str, float]:
    """Bytes by phase, without imports. held: the loaded model."""
    calibration, weights = config.calibration, config.quantization.weights
    held = held + sizes.calibration + sizes.smoothing
    batch = machine.copies * min(calibration.batch_size, calibration.trajectories)
    plans = [p for p in plan_layers(config, shapes.denoiser) if p.weight_bits != FLOAT_BITS]
    counts = {p.name: p.layer.weight.numel() for p in plans}
    phases = {
        LOADING: float(loading(shapes)),
        "reading the calibration": held + float(sizes.calibration),
    }
    if refined(config):
        size = next(shapes.denoiser.parameters()).dtype.itemsize
        rows = machine.copies * ROWS_PER_STEP
        gradients = 2 * size * sum(counts.values())  # and the weights' errors
        phases["sensitivity"] = held + gradients + rows * work.graph * HEADROOM
    judged = judged_by_output(config, shapes)
    if judged:
        phases["activation ranges"] = held + _probes(config, judged, work, machine)
        held += round(_probes(config, judged, replace(work, full=0.0), machine))
    held += sizes.quantized
    largest = max(counts.values(), default=0)
    phases["rounding weights"] = held + NEAREST_WEIGHTS * 4.0 * largest
    if weights.rounding != "nearest":
        collecting, rounding = _hessians(plans)
        phases["Hessians"] = held + max(collecting, collecting / 2 + batch * work.full * HEADROOM)
        phases["GPTQ of the widest layers"] = held + rounding
    if weights.rounding in ("adaround", "brecq"):
        grouped = {p.name: [p.name] for p in plans}
        if weights.rounding == "brecq":
            grouped = reconstruction_blocks(shapes.denoiser, [p.name for p in plans])
        block = max(sum(counts[n] for n in names) for names in grouped.values())
        rows = max(batch, JUDGED_AT_ONCE)
        phases["learning the rounding"] = (
            held + work.weights + LEARNING_WEIGHTS * 4.0 * block + rows * work.simulated
        )
    rows = machine.copies * min(calibration.batch_size, calibration.noise_trajectories)
    activations = rows * max(work.full, work.simulated)
    parameters = sum(p.numel() for p in shapes.denoiser.parameters())
    kept = work.weights if keeps(4 * parameters) else 0
    phases["measuring noise"] = held + kept + _first_call(shapes, activations)
    return phases


def _hessians(plans: list[LayerPlan]) -> tuple[float, float]:
    """While they are collected (each twice at the end), and while the layers are rounded."""
    collecting = rounding = previous = 0.0
    for group in hessian_groups(plans):
        sizes = [4.0 * plan.in_features**2 for plan in group]
        collecting = max(collecting, previous + 2 * sum(sizes))
        for i, size in enumerate(sizes):
            rounding = max(rounding, sum(sizes[i:]) + GPTQ_MATRICES * size)
        previous = sizes[-1]
    return collecting, rounding


def sample_phases(
    shapes: Shapes,
    rest: int,
    sizes: Foreseen,
    work: Activations,
    machine: Machine,
    batch: int,
) -> dict[str, float]:
    """Bytes by phase, without imports. rest: the loaded model without its denoiser, whose weights
    are freed; batch: samples drawn together."""
    held = rest + sizes.quantized
    held += round(work.weights / 4 if machine.integers else work.weights)
    rows = machine.copies * batch
    return {
        LOADING: float(loading(shapes) + sizes.quantized),
        "denoising": held + _first_call(shapes, rows * max(work.full, work.simulated)),
        "decoding": held + work.decoding * HEADROOM,
    }


def _first_call(shapes: Shapes, activations: float) -> float:
    """Activations, and the codes of the largest layer on their way to a weight."""
    largest = max(layer.weight.numel() for layer in weight_layers(shapes.denoiser).values())
    return activations * HEADROOM + UNPACKING_WEIGHTS * 4.0 * largest
