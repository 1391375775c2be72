"""What the run-time estimator reads without quantization, and how much of the excess to believe.

A reading m of the estimator at t is the quantization noise's mean plus the model's own error plus
chance. The full-precision model's mean reading b takes the second off (docs/method.md). The
third stays, and subtracting it puts noise into every following step. So the rest counts only as
far as it foretold, on trajectories where both models were asked, the error of the steps that
followed: q ~ gain (m - b), least squares through the origin. An unquantized model has no error,
hence gain 0: the correction leaves it exactly as it is. A gain that chance could have made is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .statistics import at_timestep, by_timestep

REACH = 5
"""Steps after an estimate whose mean error it has to foretell: the default interval."""
GRANULARITIES = ("tensor", "channel", "batch")
"""Shares of a batch over which a reading is averaged: a sample, each of its channels, all of it."""
FITTED = ("tensor", "channel")
"""Those with a gain of their own. A calibration holds too few batches to fit one for them."""


@dataclass(frozen=True)
class Estimate:
    """One run-time estimate at t before any baseline: mean of q [N, C], its variance [N], k [N]."""

    t: int
    mean: Tensor
    variance: Tensor
    slope: Tensor


@dataclass(frozen=True)
class StepError:
    """The true error q = eps~ - eps of a step's prediction: mean [N, C], <q, eps>/<eps, eps> [N].

    index: of the step.
    """

    t: int
    index: int
    mean: Tensor
    slope: Tensor

    @classmethod
    def of(cls, t: int, index: int, eps: Tensor, eps_q: Tensor) -> StepError:
        """eps, eps_q: [N, C, ...], both models' predictions for the same input."""
        q = eps_q - eps
        pairs = zip(q.flatten(1), eps.flatten(1), strict=True)
        slopes = torch.stack([torch.dot(a, b) / torch.dot(b, b) for a, b in pairs])
        return cls(t, index, q.flatten(2).mean(2) if q.ndim > 2 else q, slopes)


@dataclass(frozen=True)
class EstimatorBaseline:
    """Per timestep: mean [C], variance [], slope [] of the full-precision model's readings.

    gain: granularity -> t -> [], the part of a reading's excess that is real; slope_gain the same
    for the slope; largest_variance: t -> [], of the true q. Empty: everything is believed.
    """

    mean: Mapping[int, Tensor]
    variance: Mapping[int, Tensor]
    slope: Mapping[int, Tensor]
    gain: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    slope_gain: Mapping[int, Tensor] = field(default_factory=dict)
    largest_variance: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, estimates: Sequence[Estimate]) -> EstimatorBaseline:
        """From the readings of the full-precision model (`apply=False, interval=1`)."""
        groups = _by_time(estimates)
        return cls(
            {t: torch.cat([e.mean for e in group]).mean(0) for t, group in groups.items()},
            {t: torch.cat([e.variance for e in group]).mean() for t, group in groups.items()},
            {t: torch.cat([e.slope for e in group]).mean() for t, group in groups.items()},
        )

    @classmethod
    def from_statistics(cls, statistics: Mapping[str, Tensor]) -> EstimatorBaseline:
        """From the tensors of a noise-statistics artifact."""
        return cls(
            by_timestep(statistics, "runtime_mean"),
            by_timestep(statistics, "runtime_variance"),
            by_timestep(statistics, "runtime_slope"),
            {g: by_timestep(statistics, f"runtime_{g}_gain") for g in FITTED},
            by_timestep(statistics, "runtime_slope_gain"),
            dict(
                zip(
                    statistics["timesteps"].tolist(),
                    statistics["variance"].mean(1),
                    strict=True,
                )
            ),
        )

    def excess(self, t: int, mean: Tensor, granularity: str) -> Tensor:
        """The believed part of a reading [N, 1 or C, 1, ...] at t over the baseline.

        A batch's reading is believed as far as a sample's, which is too little: it holds less
        chance. Raises ConfigError where there is no baseline for t.
        """
        own = at_timestep(self.mean, t).to(mean)
        own = own if granularity == "channel" else own.mean()
        excess = mean - own.reshape(1, -1, *[1] * (mean.ndim - 2))
        gains = self.gain.get("tensor" if granularity == "batch" else granularity)
        return excess if gains is None else at_timestep(gains, t).to(mean) * excess

    def excess_variance(self, t: int, variance: Tensor) -> Tensor:
        """[N], a reading's variance less the baseline's; at most what q was found to have."""
        excess = (variance - at_timestep(self.variance, t).to(variance)).clamp(min=0)
        if not self.largest_variance:
            return excess
        return excess.minimum(at_timestep(self.largest_variance, t).to(variance))

    def slope_ratio(self, t: int, slope: Tensor, limits: tuple[float, float]) -> Tensor:
        """[N], the believed ratio of a reading's slope to the baseline's, within the limits."""
        ratio = (slope / at_timestep(self.slope, t).to(slope)).clamp(*limits)
        if not self.slope_gain:
            return ratio
        return 1 + at_timestep(self.slope_gain, t).to(slope) * (ratio - 1)


def fit_gains(
    baseline: EstimatorBaseline,
    batches: Sequence[tuple[Sequence[Estimate], Sequence[StepError]]],
    limits: tuple[float, float],
) -> dict[str, dict[int, Tensor]]:
    """ "tensor", "channel", "slope": t -> gain in [0, 1].

    batches: per batch of trajectories of the quantized model, its readings and its true errors.
    """
    sums: dict[str, dict[int, Tensor]] = {name: {} for name in (*FITTED, "slope")}
    for estimates, errors in batches:
        index_of = {error.t: error.index for error in errors}  # the last, where timesteps repeat
        for estimate in estimates:
            after = [e for e in errors if 0 < e.index - index_of[estimate.t] <= REACH]
            if not after:
                continue
            q = torch.stack([error.mean for error in after]).mean(0)
            k = torch.stack([error.slope for error in after]).mean(0)
            read = baseline.excess(estimate.t, estimate.mean, "channel")
            pairs = {
                "channel": (q, read),
                "tensor": (q.mean(1), read.mean(1)),
                "slope": (k, baseline.slope_ratio(estimate.t, estimate.slope, limits) - 1),
            }
            for name, (true, reading) in pairs.items():
                found = [(true * reading).sum(), reading.square().sum(), true.square().sum()]
                count = torch.tensor(float(true.numel()))
                added = torch.stack([*found, count]).double()
                sums[name][estimate.t] = sums[name].get(estimate.t, torch.zeros(4)) + added
    return {
        name: {t: _gain(*total.unbind()) for t, total in table.items()}
        for name, table in sums.items()
    }


def _gain(qm: Tensor, mm: Tensor, qq: Tensor, count: Tensor) -> Tensor:
    """Slope of q over m through the origin in [0, 1]; 0 unless twice its standard error or more.

    From sums over `count` pairs: q m, m m, q q.
    """
    gain = (qm / mm).nan_to_num(0.0)
    residual = (qq - gain * qm).clamp(min=0) / (count - 1).clamp(min=1)
    certain = gain.square() * mm >= 4 * residual
    return torch.where(certain, gain.clamp(0, 1), 0.0).float()


def _by_time(estimates: Sequence[Estimate]) -> dict[int, list[Estimate]]:
    groups: dict[int, list[Estimate]] = {}
    for estimate in estimates:
        groups.setdefault(estimate.t, []).append(estimate)
    return groups
