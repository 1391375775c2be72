"""Inter noise: corrections prepared offline, from the statistics of `NoiseStatistics`.

Notation as in docs/method.md: eps~ = eps + q is the quantized denoiser's prediction. Both
classes meet `sampling.samplers.Correction` by duck typing and keep no state between batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from .runtime import Step
from .statistics import at_timestep, by_timestep, per_channel, timestep_key


class OfflineCorrection:
    """A correction that makes no denoiser call of its own; what those of this kind share."""

    extra_calls = 0

    def tries(self, step: Step) -> bool:
        """Never: there is nothing to estimate."""
        return False

    def observe(
        self, step: Step, x_next: Tensor, predict: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Nothing to see at run time."""

    def deductible_variance(self, step: Step) -> Tensor | None:
        """None: a fit of the error does not model what remains."""
        return None


class PtqdCorrection(OfflineCorrection):
    """eps <- (eps~ - mean(r)) / (1 + k), with eps~ = (1 + k) eps + r; PTQD (2305.10657).

    statistics: `NoiseStatistics.finish()`. k = 0 and mean(r) = 0 change no bit.
    """

    def __init__(self, statistics: Mapping[str, Tensor], *, deduct_variance: bool = True):
        self.k = by_timestep(statistics, "correlation_k")
        self.residual_mean = by_timestep(statistics, "residual_mean")
        self.residual_variance = by_timestep(statistics, "residual_variance")
        self.deduct_variance = deduct_variance

    def correct(self, step: Step, prediction: Tensor) -> Tensor:
        """Remove the correlated and the mean of the uncorrelated part of the noise."""
        t = timestep_key(step.t)
        mean = per_channel(at_timestep(self.residual_mean, t), prediction)
        return (prediction - mean) / (1 + at_timestep(self.k, t).to(prediction))

    def deductible_variance(self, step: Step) -> Tensor | None:
        """var(r) / (1 + k)^2 as [1]: what `correct` leaves in the prediction."""
        if not self.deduct_variance:
            return None
        t = timestep_key(step.t)
        return (
            at_timestep(self.residual_variance, t) / (1 + at_timestep(self.k, t)).square()
        ).reshape(1)


class AffineCorrection(OfflineCorrection):
    """eps <- a[t, c] eps~ + b[t, c], fitted by `NoiseStatistics.finish()`."""

    def __init__(self, statistics: Mapping[str, Tensor]):
        self.a = by_timestep(statistics, "affine_a")
        self.b = by_timestep(statistics, "affine_b")

    def correct(self, step: Step, prediction: Tensor) -> Tensor:
        """The least-squares estimate of eps from eps~, per channel."""
        t = timestep_key(step.t)
        a, b = (per_channel(at_timestep(table, t), prediction) for table in (self.a, self.b))
        return a * prediction + b
