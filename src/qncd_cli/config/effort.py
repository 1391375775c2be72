"""Effort: how much calibrate and quantize look at before they decide."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

EffortName = Literal["quick", "standard", "thorough"]
DEFAULT_EFFORT: EffortName = "standard"
FEWEST = 12
"""Trajectories that a longer sampler has at least: ranges of fewer clip the outliers of others."""


@dataclass(frozen=True)
class Effort:
    """What a configuration's calibration.effort stands for.

    trajectories, noise_trajectories: what these keys of the calibration are unless they are set.
    rows: calibration rows, one a trajectory and step, that are enough: samplers of more steps draw
    fewer trajectories; None: always all of them.
    hessian_calls: batches of calibration rows, each at one timestep, that Hessians are added up
    from; hessian_rows: input vectors in one, at least, and hessian_rows_per_input for each of its
    inputs: with too few of them GPTQ fits their noise. probe_trajectories, probe_steps: where
    layers' inputs are looked at, of each of which probe_elements values are kept; ranges are chosen
    on them. sensitivity_steps, sensitivity_rows: timesteps, and rows at each, at which the effect
    of a rounding is measured, along sensitivity_projections random directions.
    """

    trajectories: int
    rows: int | None
    noise_trajectories: int
    hessian_calls: int
    hessian_rows: int
    hessian_rows_per_input: float
    probe_trajectories: int
    probe_steps: int
    probe_elements: int
    sensitivity_steps: int
    sensitivity_rows: int
    sensitivity_projections: int

    def trajectories_at(self, steps: int) -> int:
        """Trajectories of a sampler of so many steps."""
        if self.rows is None:
            return self.trajectories
        enough = max(FEWEST, math.ceil(self.rows / steps))
        return min(self.trajectories, enough)


_THOROUGH = Effort(
    trajectories=64,
    rows=None,
    noise_trajectories=32,
    hessian_calls=20,
    hessian_rows=16384,
    hessian_rows_per_input=3,
    probe_trajectories=8,
    probe_steps=10,
    probe_elements=1 << 20,
    sensitivity_steps=8,
    sensitivity_rows=4,
    sensitivity_projections=4,
)
_STANDARD = replace(
    _THOROUGH,
    trajectories=16,
    rows=320,
    noise_trajectories=8,
    probe_elements=1 << 19,
    sensitivity_steps=4,
)
_QUICK = replace(
    _STANDARD,
    trajectories=12,
    rows=240,
    noise_trajectories=4,
    hessian_calls=5,
    hessian_rows=8192,
    hessian_rows_per_input=2,
    probe_trajectories=4,
    probe_steps=5,
    probe_elements=1 << 18,
    sensitivity_rows=2,
    sensitivity_projections=2,
)
EFFORTS: dict[str, Effort] = {"quick": _QUICK, "standard": _STANDARD, "thorough": _THOROUGH}
"""What each costs and loses: docs/notebook/2026-11-27-effort.md."""
