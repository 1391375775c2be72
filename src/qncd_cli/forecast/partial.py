"""What a stage keeps on disk until its artifacts are written, at most (store/partial.py)."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping

from ..config.schema import Config
from ..ptq.cost import Cost
from . import activations
from .shapes import Shapes

CALLS_PER_STEP = 3
"""Calls of the denoiser at a step whose noise is measured: in full precision, quantized on the same
input, quantized on its own."""
WRITTEN_TWICE = 2
"""A state is written beside the one that it replaces."""


def partial_bytes(
    config: Config,
    shapes: Shapes,
    steps: int,
    costs: Mapping[str, Mapping[str, Cost]],
    results: Mapping[str, int],
) -> dict[str, int]:
    """Bytes by stage: outputs of all calls, inputs that are kept with them, and pieces of the
    result. results: bytes that each stage leaves; batches of samples are counted there."""
    row = 4 * activations.copies(config, shapes) * steps
    of_size = [math.prod(one.latent_shape) for one in (shapes, *shapes.sized.values())]
    rows = {
        "calibrate": sum(map(operator.mul, config.calibration.by_size, of_size)),
        "quantize": CALLS_PER_STEP * config.calibration.noise_trajectories * of_size[0],
    }
    found = dict.fromkeys(costs, 0)
    for stage, count in rows.items():
        kept = round(sum(cost.kept for cost in costs[stage].values()))
        states = results[stage] + max((c.partial for c in costs[stage].values()), default=0)
        found[stage] = count * row + kept + WRITTEN_TWICE * states
    return found
