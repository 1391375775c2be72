"""The section `correction` of the configuration: noise inside the network, and over the steps."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .section import Section

PAIRS, RUNTIME, STEPWISE = "pairs", "runtime", "stepwise"
"""Statistics of the noise that corrections read: errors along all trajectories that there are for
it, what the run-time estimator reads, terms of the step-wise correction."""


class InterConfig(Section):
    """Correction of the noise that accumulates over the steps (docs/method.md).

    A run-time estimate with granularity batch is one number for all samples that are drawn
    together, as published; part below 1 makes estimates for the first samples of a batch alone.
    With either, a sample depends on the batch that it is drawn in.
    """

    method: Literal["none", "runtime", "ptqd", "affine", "stepwise"] = Field(
        "none",
        description="runtime estimates the noise while sampling; the others use what quantize "
        "measured and cost nothing; stepwise also takes back what earlier steps left",
    )
    target: Literal["injected", "total"] = Field(
        "total", description="the noise of the step itself, as published, or all of it so far"
    )
    granularity: Literal["batch", "tensor", "channel"] = Field(
        "channel",
        description="over what a run-time estimate is averaged: all samples that are drawn "
        "together, as published (they then depend on their batch), one sample, one of its channels",
    )
    interval: int = Field(5, ge=1, description="steps between two run-time estimates")
    first: int = Field(0, ge=0, description="the step, from 0, of the first run-time estimate")
    repeat: bool = Field(
        False,
        description="make the step of an estimate twice, as published: first without any "
        "correction, then with the new estimate",
    )
    part: float = Field(
        1.0,
        gt=0,
        le=1,
        description="of a batch that has run-time estimates of its own; below 1 the rest takes "
        "their mean, and samples depend on their batch",
    )
    baseline: Literal["none", "full_precision"] = Field(
        "full_precision", description="what full precision reads as well is no noise"
    )
    slope: bool = Field(False, description="also divide by the slope over full precision's")
    noise: Literal["plain", "balanced", "antithetic"] = Field(
        "plain",
        description="that run-time estimates add: as published, with the mean zero in every "
        "channel, or twice with opposite signs",
    )

    field: int = Field(
        8,
        ge=1,
        le=64,
        description="of stepwise: values of its offset along each side of the latent, at most; "
        "1: one for each channel",
    )

    @model_validator(mode="after")
    def _check(self) -> InterConfig:
        if self.slope and self.baseline == "none":
            raise ValueError("slope needs baseline full_precision to compare with")
        return self

    @property
    def statistics(self) -> frozenset[str]:
        """What quantize has to measure for it, of PAIRS, RUNTIME and STEPWISE."""
        if self.method == "none" or (self.method == "runtime" and self.baseline == "none"):
            return frozenset()
        more = {"runtime": RUNTIME, "stepwise": STEPWISE}.get(self.method, PAIRS)
        return frozenset((PAIRS, more))

    @property
    def depends_on_batch(self) -> bool:
        """Whether a sample is not the same in every batch."""
        return self.method == "runtime" and (self.part < 1 or self.granularity == "batch")

    def identity(self) -> dict[str, Any]:
        """What of it decides images."""
        if self.method == "none":
            return {"method": "none"}
        tree = self.model_dump()
        if (
            self.part == 1 or not self.depends_on_batch
        ):  # sets drawn before there was a part stay valid
            del tree["part"]
        added = (
            "first",
            "repeat",
            "noise",
            "field",
        )  # sets drawn before there were these keys stay valid
        for key in added:
            if tree[key] == InterConfig.model_fields[key].default:
                del tree[key]
        return tree


class CorrectionConfig(Section):
    """Corrections of the noise inside the network (intra) and over the steps (inter)."""

    intra: Literal["none", "embedding", "smoothquant", "range", "auto"] = Field(
        "none",
        description="how smoothing factors are made; auto: per layer the one with the least output "
        "error",
    )
    smoothing_strength: float = Field(0.5, ge=0, le=1, description="of smoothquant and range")
    reuse: Literal["none", "site", "output", "both"] = Field(
        "both",
        description="with sampling.reuse, what is mended: the values that are kept, the prediction "
        "(as stepwise does), or both",
    )
    inter: InterConfig = InterConfig()
