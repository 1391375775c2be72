"""Inter noise: what brings a quantized trajectory back to the full-precision one, step by step.

Notation as in docs/method.md, for two trajectories from one seed:
    x_s, x~_s    latents at the level after a step, in VP scale; x~ of the quantized model, whose
                 earlier steps are corrected already
    r            response of the step: what one unit more of the prediction adds to x~_s
    wanted       (x_s - x~_s) / r: what would have to be added to eps~ to end at x_s

The wanted change of eps~ is regressed on what a sampler has at hand, per step and channel:
    wanted ~ a eps~ + b x~_t + f(position)
by least squares over calibration trajectories. That takes out everything of the deviation that is
the same for all samples: a shift, a wrong scale, a loss of variance, of this step and of those
before. What differs from sample to sample stays. `PtqdCorrection` looks at the noise of single
predictions instead, from uncorrected trajectories, and cannot take back what has come in earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from .offline import OfflineCorrection
from .runtime import Step
from .statistics import per_channel

RIDGE = 1e-4
"""Added to the power of every regressor, relative to it."""
FOLDS = 4
"""Parts of the trajectories, each of which judges a fit of the others."""


class StepOf(Step, Protocol):
    """A step whose model input is known."""

    @property
    def x(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Terms:
    """What is added to a prediction at one step: prediction, latent [C] times eps~ and x~_t, and
    field [C, *grid]."""

    prediction: Tensor
    latent: Tensor
    field: Tensor

    def added(self, eps: Tensor, x: Tensor) -> Tensor:
        """eps, x [N, C, ...] -> the change of eps."""
        linear = per_channel(self.prediction, eps) * eps + per_channel(self.latent, x) * x
        return linear + spread(self.field.to(eps), eps.shape[2:])

    def times(self, factor: float) -> Terms:
        """All of it made smaller."""
        return Terms(factor * self.prediction, factor * self.latent, factor * self.field)


def field_grid(shape: Sequence[int], most: int) -> tuple[int, ...]:
    """Sides of the offset's grid, of at most so many values each, for latents [C, *shape]; one
    value unless they are images."""
    return tuple(min(most, side) for side in shape) if len(shape) == 2 else (1,) * len(shape)


def spread(field: Tensor, shape: Sequence[int]) -> Tensor:
    """[C, *grid] -> [1, C, *shape], bilinear; grids of one value are constant."""
    if len(shape) != 2:
        return field[None]
    return F.interpolate(field[None], tuple(shape), mode="bilinear", align_corners=False)


def fit_terms(wanted: Tensor, eps: Tensor, x: Tensor, field: int = 8) -> Terms:
    """Terms for one step; wanted, eps, x: [N, C, ...] float32 of N trajectories.

    field: values of the offset along each side of the latent, at most; between them it is bilinear.

    Everything is made smaller by the slope of what held-out trajectories wanted over what a fit
    of the others gives them, and is nothing where that is not positive: a fit that does not carry
    over does no harm. One trajectory cannot be held out of itself; nothing is fitted from it.
    """
    count = len(wanted)
    folds = torch.arange(count) % FOLDS
    given = power = 0.0
    for fold in range(min(FOLDS, count)):
        seen, held = folds != fold, folds == fold
        if not seen.any():
            continue
        part = _fit(wanted[seen], eps[seen], x[seen], field)
        foretold = part.added(eps[held], x[held]).double()
        given += float((foretold * wanted[held]).sum())
        power += float(foretold.square().sum())
    carries_over = min(1.0, max(0.0, given / power)) if power > 0 else 0.0
    return _fit(wanted, eps, x, field).times(carries_over)


def _fit(wanted: Tensor, eps: Tensor, x: Tensor, field: int) -> Terms:
    """The least squares alone, and the field of what it leaves."""
    constant = torch.ones_like(eps)
    regressors = torch.stack([constant, eps, x], -1).transpose(0, 1).flatten(1, -2).double()
    target = wanted.transpose(0, 1).flatten(1).double()[..., None]  # [C, N * ..., 1]
    gram = regressors.transpose(1, 2) @ regressors
    gram = gram + RIDGE * torch.diag_embed(gram.diagonal(dim1=1, dim2=2) + torch.finfo().tiny)
    found = torch.linalg.solve(gram, regressors.transpose(1, 2) @ target)[..., 0].float()
    offset, by_eps, by_x = found.unbind(1)
    channels = wanted.shape[1]
    flat = offset.reshape(channels, *[1] * (wanted.ndim - 2))
    linear = Terms(by_eps, by_x, flat)
    left = wanted - linear.added(eps, x)
    return Terms(by_eps, by_x, flat + _field(left, field))


def _field(left: Tensor, most: int) -> Tensor:
    """Mean of [N, C, ...] on the grid, shrunk to what exceeds its own chance (empirical Bayes)."""
    grid = field_grid(left.shape[2:], most)
    if len(grid) != 2 or max(grid) == 1 or len(left) < 2:  # the offset of all places is known
        return torch.zeros(left.shape[1], *grid)
    cells = F.adaptive_avg_pool2d(left, grid)
    mean, chance = cells.mean(0), cells.var(0) / len(cells)
    over = (1, 2)
    real = (mean.square() - chance).mean(over, keepdim=True).clamp(min=0)
    share = real / (real + chance.mean(over, keepdim=True)).clamp(min=torch.finfo().tiny)
    return share * mean


class StepwiseCorrection(OfflineCorrection):
    """eps <- eps~ + a eps~ + b x~_t + f, by step and channel, fitted by `StepwiseFit`.

    statistics: stepwise_prediction, stepwise_latent [S, C], stepwise_field [S, C, *grid] of the S
    steps of the sampler. Zeros change no bit.
    """

    def __init__(self, statistics: Mapping[str, Tensor]):
        rows = [statistics[f"stepwise_{name}"] for name in ("prediction", "latent", "field")]
        self.terms = [Terms(*row) for row in zip(*rows, strict=True)]

    def correct(self, step: StepOf, prediction: Tensor) -> Tensor:
        """Add the step's terms. Raises ConfigError for a step that nothing was fitted for."""
        if step.index >= len(self.terms):
            raise ConfigError(
                f"the step-wise correction has {len(self.terms)} steps, this is number "
                f"{step.index + 1}",
                "run quantize again with the same sampling.steps and scheduler",
            )
        assert step.x is not None
        return prediction + self.terms[step.index].added(prediction, step.x)


class StepwiseFit(OfflineCorrection):
    """Fits the terms of every step while the quantized model draws, and applies them at once.

    One object for all calibration trajectories, drawn together: later steps are fitted on latents
    that the earlier steps' terms have corrected.

    goals: [S, N, C, ...], latents of full precision after each step, VP scale. responses: of each
    step; one that answers nothing is left as it is. field: as fit_terms has it.
    """

    def __init__(self, goals: Tensor, responses: Sequence[float], field: int = 8):
        self.goals, self.responses, self.field = goals, responses, field
        self.terms: list[Terms] = []
        self._reached: Tensor | None = None

    def tries(self, step: Step) -> bool:
        """Always: where the uncorrected step ends is what is to be mended."""
        return True

    def observe(
        self, step: Step, x_next: Tensor, predict: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Take the result of the step on trial."""
        self._reached = x_next

    def correct(self, step: StepOf, prediction: Tensor) -> Tensor:
        """Fit the step's terms and apply them."""
        assert self._reached is not None and step.x is not None
        response = self.responses[step.index]
        left = self.goals[step.index] - self._reached
        if abs(response) > torch.finfo().eps:
            terms = fit_terms(left / response, prediction, step.x, self.field)
        else:
            terms = fit_terms(torch.zeros_like(left), prediction, step.x, self.field)
        self.terms.append(terms)
        return prediction + terms.added(prediction, step.x)

    def statistics(self) -> dict[str, Tensor]:
        """What StepwiseCorrection takes."""
        return {
            f"stepwise_{name}": torch.stack([getattr(terms, name).float() for terms in self.terms])
            for name in ("prediction", "latent", "field")
        }
