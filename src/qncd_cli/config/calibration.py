"""The section `calibration` of the configuration: what is looked at before quantizing."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from .effort import EFFORTS, Effort, EffortName
from .section import Section


class CalibrationConfig(Section):
    """What is observed in full precision before anything is quantized."""

    effort: EffortName = Field(
        "standard",
        description="how much is looked at before anything is decided: quick takes a fraction of "
        "the time, thorough a multiple (docs/notebook/2026-11-27-effort.md)",
    )
    trajectories: int = Field(
        EFFORTS["standard"].trajectories,
        ge=1,
        description="full-precision sampling trajectories (default: by effort)",
    )
    batch_size: int = Field(
        32, ge=1, description="trajectories drawn together; fewer need less memory"
    )
    seed: int = Field(
        1_000_000, ge=0, description="seed of the first trajectory, away from the samples' seeds"
    )
    noise_trajectories: int = Field(
        EFFORTS["standard"].noise_trajectories,
        ge=1,
        description="how many of them also measure the quantization noise (default: by effort, at "
        "most all)",
    )

    @model_validator(mode="before")
    @classmethod
    def _as_many_as_the_effort_says(cls, data: Any) -> Any:
        effort = (
            EFFORTS.get(str(data.get("effort", "standard"))) if isinstance(data, dict) else None
        )
        if effort is None:
            return data  # what it is instead is told below
        every = data.get("trajectories", effort.trajectories)
        if not isinstance(every, int):
            return data
        noise = min(effort.noise_trajectories, every)
        return {"trajectories": every, "noise_trajectories": noise, **data}

    @property
    def looks(self) -> Effort:
        """What the effort stands for."""
        return EFFORTS[self.effort]

    @model_validator(mode="after")
    def _check(self) -> CalibrationConfig:
        if self.noise_trajectories > self.trajectories:
            raise ValueError("noise_trajectories cannot exceed trajectories")
        return self
