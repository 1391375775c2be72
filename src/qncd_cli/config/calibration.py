"""The section `calibration` of the configuration: what is looked at before quantizing."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from .effort import DEFAULT_EFFORT, EFFORTS, Effort, EffortName
from .section import Section, Side


class CalibrationConfig(Section):
    """What is observed in full precision before anything is quantized."""

    effort: EffortName = Field(
        DEFAULT_EFFORT,
        description="how much is looked at before anything is decided: quick takes a fraction of "
        "the time, thorough a multiple (docs/notebook/2026-11-27-effort.md)",
    )
    trajectories: int = Field(
        EFFORTS[DEFAULT_EFFORT].trajectories,
        ge=1,
        description="full-precision sampling trajectories (default: by effort, fewer of samplers "
        "with many steps)",
    )
    batch_size: int = Field(
        32, ge=1, description="trajectories drawn together; fewer need less memory"
    )
    seed: int = Field(
        1_000_000, ge=0, description="seed of the first trajectory, away from the samples' seeds"
    )
    noise_trajectories: int = Field(
        EFFORTS[DEFAULT_EFFORT].noise_trajectories,
        ge=1,
        description="how many of them also measure the quantization noise (default: by effort, at "
        "most all)",
    )
    sizes: tuple[tuple[Side, Side], ...] | None = Field(
        None,
        description="heights and widths of images, in pixels, beside sampling's own: batches of "
        "trajectories take all of them in turn, so that activation ranges are of all; smoothing, "
        "rounding and corrections look at sampling's own size (docs/models.md)",
    )

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, data: Any) -> Any:
        sizes = data.get("sizes") if isinstance(data, dict) else None
        if not isinstance(sizes, list):
            return data
        return {**data, "sizes": tuple(tuple(s) if isinstance(s, list) else s for s in sizes)}

    @model_validator(mode="before")
    @classmethod
    def _as_many_as_the_effort_says(cls, data: Any) -> Any:
        effort = (
            EFFORTS.get(str(data.get("effort", DEFAULT_EFFORT))) if isinstance(data, dict) else None
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
        if self.sizes is None:
            return self
        if not self.sizes or len(set(self.sizes)) != len(self.sizes):
            raise ValueError("sizes must name each size once; null: sampling's own alone")
        if 0 in self.by_size:
            batches = -(-self.trajectories // self.batch_size)
            raise ValueError(
                f"sizes: sampling's own and {len(self.sizes)} more need a batch each, but "
                f"{self.trajectories} trajectories, {self.batch_size} at once, make {batches}: "
                "lower calibration.batch_size or raise calibration.trajectories"
            )
        return self

    @property
    def by_size(self) -> list[int]:
        """How many trajectories are of sampling's own size, and of each of sizes: batches take
        them in turn."""
        turns, every = 1 + len(self.sizes or ()), self.trajectories
        batches = [min(self.batch_size, every - n) for n in range(0, every, self.batch_size)]
        return [sum(batches[turn::turns]) for turn in range(turns)]
