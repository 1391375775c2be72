"""Inter noise: estimate the quantization noise in a noise prediction and filter it out.

Notation as in docs/method.md:
    eps, eps~    prediction of the full-precision and of the quantized denoiser, q = eps~ - eps
    t, s         the step just made went from t to s (less noisy); abar_t, abar_s its levels
    x~_s         latent after the step, VP scale; x0~ the clean latent that the step implied
    z            fresh noise that diffuses x~_s back up to x^_t;  e^ = eps~(x^_t, t)
    n            the whole noise in x^_t, of which z is only the newest part

`RuntimeCorrection` estimates while sampling and meets `sampling.samplers.Correction` by duck
typing; `offline_correction` holds those that apply statistics prepared beforehand. Predictions
are eps here, whatever the model predicts, but of rectified flows the velocity v = eps - x_0: there
e^ is v~(x^_t, t) and a perfect model returns n - x0~. Each object serves one batch's trajectory.

What one estimate can see (data N(mu, v / abar_t), exact linear denoiser, a shift D of the
prediction, whatever caused it, nothing subtracted yet; w = (1 - abar_t) / (v + 1 - abar_t), and
rho < 1 the ratio of sqrt((1 - abar) / abar) at s to that at t):
    injected     E[q] = (1 - w (1 - rho)) D    nearly all of it, but also the chance mean of the
                                               sample's own noise, about 1 / sqrt(elements)
    total        E[q] = (1 - w) (1 - rho) D    little chance mean, but nearly blind when steps are
                                               short (rho near 1) or noisy (w near 1), because
                                               x0~ and eps_s, hence n, already contain D
A factor, eps~ = (1 + k) eps, shows in the slope <e^, z> / <z, z>: over the full-precision one it
is 1 + k in expectation, because z is independent of x~_s. The slope over n is not:
eps_s, a part of n, carries the factor. So z serves here, whatever the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from .baseline import GRANULARITIES, Estimate, EstimatorBaseline
from .statistics import timestep_key

TARGETS = ("injected", "total")
NOISES = ("plain", "balanced", "antithetic")
SLOPE_RATIOS = (0.5, 2.0)
"""A slope farther from the full-precision one says that the estimate failed; it is clamped."""


class Step(Protocol):
    """The part of `sampling.samplers.StepInfo` that corrections read."""

    @property
    def index(self) -> int: ...

    @property
    def t(self) -> float: ...

    @property
    def abar_t(self) -> float: ...

    @property
    def abar_next(self) -> float: ...

    @property
    def number(self) -> int: ...

    @property
    def lowers(self) -> bool: ...

    @property
    def velocity(self) -> bool: ...

    @property
    def x0(self) -> Tensor | None: ...


def renoise(x_s: Tensor, abar_t: float, abar_s: float, z: Tensor) -> Tensor:
    """x^_t = sqrt(abar_t / abar_s) x~_s + sqrt(1 - abar_t / abar_s) z: noise added to a latent.

    x_s, z: [N, C, ...]. Raises ValueError if abar_t > abar_s (t must be the noisier level).
    """
    if abar_t > abar_s:
        raise ValueError(f"abar_t = {abar_t} is above abar_s = {abar_s}: t must be noisier than s")
    ratio = abar_t / abar_s
    return math.sqrt(ratio) * x_s + math.sqrt(1 - ratio) * z


def contained_noise(x_s: Tensor, x0: Tensor, abar_s: float) -> Tensor:
    """eps_s with x~_s = sqrt(abar_s) x0~ + sqrt(1 - abar_s) eps_s; in DDIM (eta 0) it is eps~."""
    return (x_s - math.sqrt(abar_s) * x0) / math.sqrt(1 - abar_s)


def total_noise(eps_s: Tensor, z: Tensor, abar_t: float, abar_s: float) -> Tensor:
    """n = (sqrt(abar_t/abar_s) sqrt(1-abar_s) eps_s + sqrt(1-abar_t/abar_s) z) / sqrt(1-abar_t).

    eps_s: noise contained in x~_s (`contained_noise`); z: what `renoise` added; both [N, C, ...].
    """
    ratio = abar_t / abar_s
    old = math.sqrt(ratio * (1 - abar_s))
    return (old * eps_s + math.sqrt(1 - ratio) * z) / math.sqrt(1 - abar_t)


def reduce_mean(q: Tensor, granularity: str) -> Tensor:
    """Mean of q [N, C, ...]: "tensor", "batch" -> [N, 1, 1, ...], "channel" -> [N, C, 1, ...].

    "tensor" and "channel" are means of each sample. They are computed one sample at a time: the
    order of summation, and with it every bit of the result, is then the same in a batch of any
    size. "batch" is one number for all, the mean over the samples and all their elements (QNCD's
    published code). Raises ConfigError: unknown granularity.
    """
    if granularity not in GRANULARITIES:
        raise ConfigError(
            f"unknown granularity {granularity!r} of the run-time correction",
            f"use {' or '.join(GRANULARITIES)}",
        )
    groups = q.shape[1] if granularity == "channel" else 1
    means = torch.stack([sample.reshape(groups, -1).float().mean(-1) for sample in q])
    if granularity == "batch":
        means = means.mean(0, keepdim=True).expand_as(means)
    return means.to(q.dtype).reshape(len(q), -1, *[1] * (q.ndim - 2))


def slope(e: Tensor, z: Tensor) -> Tensor:
    """k = <e, z> / <z, z> per sample: [N, C, ...] twice -> [N]."""
    pairs = zip(e.flatten(1), z.flatten(1), strict=True)
    return torch.stack([torch.dot(a, b) / torch.dot(b, b) for a, b in pairs])


class RuntimeCorrection:
    """Estimate q with an extra denoiser call every `interval` steps, subtract its mean (QNCD).

    generators: one per sample for z (their own stream, so that the sample's draws stay put).
    target: "injected" compares e^ with z as published, "total" with n.
    granularity: of the mean, `reduce_mean`; with "batch", as published, a sample depends on the
        batch that it is drawn in.
    first, interval: estimates follow steps first, first + interval, ... (from 0) and act from the
        next step on, until replaced. A step that does not lower the noise level (PNDM repeats
        timesteps) cannot be estimated; its turn passes to the next one.
    repeat: such a step is made twice, as published: on trial with the uncorrected prediction, whose
        result is what the estimate looks at, and then with the same prediction less the new
        estimate. No earlier estimate enters either. Steps count by `Step.number`.
    baseline: what the full-precision model scores, and how much of an excess over it is real;
        without it, as published, the model's own error and all chance count as quantization noise.
    slope: also divide the prediction by the sample's own slope over the baseline's (not in the
        paper). A slope is a chance quantity, too: with no factor to find, it adds noise of its own.
    part: of the batch that has estimates of its own: the first ceil(part N) samples, for which
        alone the extra call is made. The others take the mean of their readings, so that below 1
        (not in the paper) a sample depends on its batch, too.
    noise: z. "balanced" has the mean zero in every channel of every sample, which takes its part of
        the chance out of the mean; "antithetic" asks twice, with z and -z, and takes the mean of
        both readings, from which all that is linear in z is gone. Neither is in the paper.
    apply: False only records `estimates`. deduct_variance: see `deductible_variance`.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        *,
        target: str = "total",
        granularity: str = "tensor",
        interval: int = 10,
        first: int = 0,
        repeat: bool = False,
        part: float = 1.0,
        baseline: EstimatorBaseline | None = None,
        slope: bool = False,
        noise: str = "plain",
        apply: bool = True,
        deduct_variance: bool = True,
    ):
        _check_choice("target", target, TARGETS)
        _check_choice("noise", noise, NOISES)
        _check_choice("granularity", granularity, GRANULARITIES)
        if interval < 1:
            raise ConfigError(f"correction interval {interval} is not positive", "use 1 or more")
        if first < 0:
            raise ConfigError(f"correction first {first} is negative", "use 0 or more")
        if not 0 < part <= 1:
            raise ConfigError(
                f"correction part {part} is no part of a batch", "use more than 0, at most 1"
            )
        self.generators = list(generators)
        self.target, self.granularity = target, granularity
        self.interval, self.first, self.repeat = interval, first, repeat
        self.estimated = estimated_of(len(self.generators), part)
        self.baseline, self.slope, self.noise = baseline, slope, noise
        self.apply, self.deduct_variance = apply, deduct_variance
        self.extra_calls = 0
        self.estimates: list[Estimate] = []
        self.q_mean: Tensor | None = None  # [N, 1 or C, 1, ...], baseline taken off
        self.q_variance: Tensor | None = None  # [N]
        self.slope_ratio: Tensor | None = None  # [N], over the full-precision slope
        self._due = False

    def tries(self, step: Step) -> bool:
        """Whether the step is made on trial first: with `repeat`, where an estimate is due.

        Not a step to a latent without noise, where the total target has nothing to look at.
        """
        blind = self.target == "total" and step.abar_next == 1
        return self.repeat and step.lowers and not blind and self._at(step.number)

    def _at(self, number: int) -> bool:
        return number >= self.first and (number - self.first) % self.interval == 0

    def correct(self, step: Step, prediction: Tensor) -> Tensor:
        """(eps~ - mean(q)) / slope ratio, with the latest estimate."""
        if self.q_mean is None or not self.apply:
            return prediction
        corrected = prediction - self.q_mean
        if self.slope_ratio is None:
            return corrected
        return corrected / self.slope_ratio.reshape(-1, *[1] * (prediction.ndim - 1))

    def observe(
        self, step: Step, x_next: Tensor, predict: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Estimate q at the level of the step just made, if it is time to."""
        if self.repeat:
            if not self.tries(step):
                return
        else:
            self._due = self._due or self._at(step.index)
            if not self._due or not step.lowers:
                return
            self._due = False
        self._check_size(x_next)
        assert step.x0 is not None
        x_next, x0 = x_next[: self.estimated], step.x0[: self.estimated]
        z = self._draw(x_next)
        draws = (z, -z) if self.noise == "antithetic" else (z,)
        readings = [self._read(step, x_next, x0, draw, predict) for draw in draws]
        q, k = (torch.stack(parts).mean(0) for parts in zip(*readings, strict=True))
        self._store(timestep_key(step.t), q, k)

    def _read(
        self,
        step: Step,
        x_next: Tensor,
        x0: Tensor,
        z: Tensor,
        predict: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """e^ less what a perfect model returns [N, C, ...], and its slope over z [N]."""
        self.extra_calls += 1
        x_t = renoise(x_next, step.abar_t, step.abar_next, z)
        e = predict(x_t, torch.as_tensor(step.t, device=x_t.device))
        noise = z
        if self.target == "total":
            eps_s = contained_noise(x_next, x0, step.abar_next)
            noise = total_noise(eps_s, z, step.abar_t, step.abar_next)
        perfect = noise - x0 if step.velocity else noise
        return e - perfect, slope(e, z)

    def deductible_variance(self, step: Step) -> Tensor | None:
        """var_q [N]: what the latest estimate leaves after its mean, less the baseline's.

        A slope is not taken out of it.
        """
        return self.q_variance if self.apply and self.deduct_variance else None

    def _check_size(self, x: Tensor) -> None:
        if len(self.generators) != len(x):
            raise ConfigError(
                f"{len(self.generators)} generators for {len(x)} samples",
                "make a new correction for every batch",
            )

    def _draw(self, like: Tensor) -> Tensor:
        """z ~ N(0, I), every sample from its own generator, on the CPU in float32."""
        generators = self.generators[: len(like)]
        z = torch.cat([torch.randn((1, *like.shape[1:]), generator=g) for g in generators])
        if self.noise == "balanced":
            z = z - z.flatten(2).mean(2).reshape(*z.shape[:2], *[1] * (z.ndim - 2))
        return z.to(like)

    def _store(self, t: int, q: Tensor, k: Tensor) -> None:
        mean = reduce_mean(q, self.granularity)
        variance = reduce_mean((q - mean).square(), "tensor").flatten()
        self.estimates.append(Estimate(t, reduce_mean(q, "channel").flatten(1), variance, k))
        mean, variance, k = (self._for_all(reading) for reading in (mean, variance, k))
        if self.baseline is not None:
            mean = self.baseline.excess(t, mean, self.granularity)
            variance = self.baseline.excess_variance(t, variance)
            if self.slope:
                self.slope_ratio = self.baseline.slope_ratio(t, k, SLOPE_RATIOS)
        self.q_mean, self.q_variance = mean, variance

    def _for_all(self, reading: Tensor) -> Tensor:
        """[estimated, ...] -> [N, ...]: samples without a reading of their own take the mean."""
        rest = len(self.generators) - len(reading)
        if rest == 0:
            return reading
        return torch.cat([reading, reading.mean(0, keepdim=True).expand(rest, *reading.shape[1:])])


def estimated_of(samples: int, part: float) -> int:
    """ceil(part * samples), with 0.07 of 100 as 7, which in floating point is more; at least 1."""
    return max(1, math.ceil(round(part * samples, 9)))


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(
            f"unknown {name} {value!r} of the run-time correction", f"use {' or '.join(known)}"
        )
