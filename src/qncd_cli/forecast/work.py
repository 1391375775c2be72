"""Forecast of work: how much the stages compute, and roughly how long that takes.

It counts the calls of the denoiser and those steps of rounding that grow faster than the weights.
Their time follows from two rates measured on this machine: a rough estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config.schema import Config
from ..models.smoothing_sites import smoothing_sites
from ..models.topology import LayerCost
from ..ptq.bit_budget import TRIED_ROWS, WIDTHS
from ..ptq.extra_bits import PROJECTIONS, ROWS_PER_STEP
from ..ptq.extra_bits import STEPS as SENSITIVITY_STEPS
from ..ptq.hessians import HESSIAN_CALLS, HESSIAN_ROWS, HESSIAN_ROWS_PER_INPUT, hessian_groups
from ..ptq.layer_plan import plan_layers
from ..ptq.output_ranges import FRACTIONS
from ..ptq.probes import PROBE_STEPS, PROBE_TRAJECTORIES
from ..ptq.smoothing_choice import EMBEDDED_CLASSES
from ..quant.rounding import CLIP_FRACTIONS
from ..spec import FLOAT_BITS
from .activations import Activations
from .artifacts import refined
from .memory import Machine, judged_by_output, probe_rows, probed_for_smoothing
from .shapes import Shapes

EFFICIENCY = 0.6
"""Share of the best rate of one large product that a whole denoiser reaches; larger: shorter
forecasts (docs/notebook/2026-11-23-ldm4-speed.md: LDM-4 0.49 to 0.76, by machine and run)."""
SIMULATION = 1.5
"""Time of the simulated denoiser over full precision's."""
INTEGERS = 0.5
"""The same of the int8 backend, uncompiled: LDM-4 0.30 and 0.37, fashion-ldm 0.83 (speed in
docs/notebook)."""
BACKWARD = 2.0
"""Time of a backward pass over that of a forward one."""
ROUNDING_PASSES = 8
"""Passes over a weight for one fraction of the search by squared error."""
LEARNING_PASSES = 3
"""Forward and backward, of one gradient step."""


@dataclass(frozen=True)
class Work:
    """macs: multiply-accumulates in floating point; passes: elements that element-wise operations
    read and write."""

    macs: float
    passes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.macs + other.macs, self.passes + other.passes)

    def seconds(self, macs_per_second: float, elements_per_second: float) -> float:
        return self.macs / (EFFICIENCY * macs_per_second) + self.passes / elements_per_second


def calibrate_work(
    config: Config, shapes: Shapes, costs: list[LayerCost], calls: int, machine: Machine
) -> Work:
    """calls: of the denoiser for one trajectory."""
    rows = config.calibration.trajectories * machine.copies * calls
    if probed_for_smoothing(config, shapes):
        rows += _probed(config, machine) * calls
    if config.correction.intra in ("embedding", "auto") and smoothing_sites(shapes.denoiser):
        rows += min(shapes.classes or 1, EMBEDDED_CLASSES) * calls
    return Work(rows * total(costs))


def quantize_work(
    config: Config,
    shapes: Shapes,
    costs: list[LayerCost],
    calls: int,
    machine: Machine,
    activations: Activations,
) -> Work:
    """calls: of the denoiser for one trajectory."""
    macs = total(costs)
    of = {cost.name: cost.macs for cost in costs}
    weights = config.quantization.weights
    plans = [p for p in plan_layers(config, shapes.denoiser) if p.weight_bits != FLOAT_BITS]
    sizes = {p.name: p.layer.weight.numel() for p in plans}
    work = Work(0.0, ROUNDING_PASSES * CLIP_FRACTIONS * sum(sizes.values()))
    if refined(config):
        rows = machine.copies * ROWS_PER_STEP * min(SENSITIVITY_STEPS, calls)
        work += Work(rows * macs * (1 + BACKWARD * PROJECTIONS))
    judged = judged_by_output(config, shapes)
    if judged:
        tried = len(FRACTIONS) ** 2 * min(PROBE_STEPS, calls)
        ranges = sum(
            of.get(p.name, 0) * probe_rows(config, p, activations, machine) for p in judged
        )
        work += Work(_probed(config, machine) * calls * macs + tried * ranges)
    if weights.budget is not None:
        tried = len(WIDTHS) * len(plans)
        work += Work(tried * TRIED_ROWS * macs, tried * ROUNDING_PASSES * sum(sizes.values()))
    batch = min(config.calibration.batch_size, config.calibration.trajectories)
    if weights.rounding != "nearest":
        rows = min(HESSIAN_CALLS, calls) * batch * machine.copies
        work += Work(len(hessian_groups(plans)) * rows * macs)
        for p in plans:
            width = p.in_features
            there = rows * of.get(p.name, 0) / sizes[p.name]  # one for each output position
            vectors = min(there, max(HESSIAN_ROWS, HESSIAN_ROWS_PER_INPUT * width))
            # the Hessian, two factorisations and an inverse, the columns one after the other
            work += Work((vectors + width + sizes[p.name] / width) * width**2)
    if weights.rounding in ("adaround", "brecq"):
        samples = weights.iterations * weights.reconstruction_batch
        work += Work(LEARNING_PASSES * samples * macs)
    rows = config.calibration.noise_trajectories * machine.copies * calls
    return work + Work(rows * macs * (2 * SIMULATION + 3))  # the estimator asks each step twice


def sample_work(
    costs: list[LayerCost], calls: int, machine: Machine, count: int, decoding: int
) -> Work:
    """decoding: MACs of the first stage for one image."""
    factor = INTEGERS if machine.integers else SIMULATION
    return Work(count * (machine.copies * calls * total(costs) * factor + decoding))


def total(costs: list[LayerCost]) -> int:
    return sum(cost.macs for cost in costs)


def _probed(config: Config, machine: Machine) -> int:
    return min(PROBE_TRAJECTORIES, config.calibration.trajectories) * machine.copies
