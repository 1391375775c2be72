#!/usr/bin/env python
"""What corrections of a step could gain that have more, or less, to go by than `stepwise` has.

    qncd calibrate --config fashion_ldm_w4a6 --set quantization.preset=best-label \\
      --set correction.inter.method=stepwise
    qncd quantize
    python scripts/foretold.py --num 400

Every row regresses what would have to be added to a prediction, step by step on calibration
trajectories that its own earlier steps have corrected (docs/method.md), and is made smaller by
what held-out trajectories want; only the regressors differ. It then draws seeds that calibration
has not seen: SQNR of the latents against full precision, pooled and median, and the median gain.
Of models whose corrections see eps: paths of flow matching have another.

Q-Drift (arXiv 2603.18095) multiplies the update of a step by a factor; StepbaQ (NeurIPS 2024)
rescales the latent and goes on from another timestep. To first order in the change both add
multiples of the prediction and the latent, the same for all channels: no choice of their factors
can be nearer in least squares than the row that fits these multiples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from qncd_cli.cli.console import ErrorReportingCommand
from qncd_cli.cli.shared import open_model
from qncd_cli.config.loading import load_config
from qncd_cli.config.schema import Config
from qncd_cli.correction.offline import OfflineCorrection
from qncd_cli.correction.stepwise import FOLDS, RIDGE, StepOf, fit_terms
from qncd_cli.metrics.tensor import sqnr_db
from qncd_cli.models.loading import DiffusionModel
from qncd_cli.ptq.stepwise import InBatches, goals_of, latent_recorder
from qncd_cli.runtime import trajectory
from qncd_cli.runtime.denoiser import Denoiser, full_denoiser, quantized_denoiser
from qncd_cli.sampling.levels import plan_steps
from qncd_cli.sampling.noise import chunks
from qncd_cli.sampling.response import responses
from qncd_cli.sampling.samplers import make_scheduler
from qncd_cli.store import artifacts
from qncd_cli.store.run_dir import find_run

BATCH = 50
KNOTS, EDGE = 9, 1.25
"""Of functions of a value: how many numbers, and where the outer ones are."""


@dataclass(frozen=True)
class Seen:
    """What a step has to go by: guided prediction, latent, the clean latent that they imply, and
    the prediction of every branch, each [N, C, H, W]."""

    eps: Tensor
    x: Tensor
    clean: Tensor
    branches: list[Tensor]

    def rows(self, chosen: Tensor) -> Seen:
        branches = [b[chosen] for b in self.branches]
        return Seen(self.eps[chosen], self.x[chosen], self.clean[chosen], branches)


Regressors = Callable[[Seen], Tensor]
"""[N, C, K, H, W], or [N, 1, K, H, W] where every channel has the same."""


class Fit:
    """Least squares of what is wanted on regressors; pooled: the same factors for all channels."""

    def __init__(self, regressors: Regressors, pooled: bool, wanted: Tensor, seen: Seen):
        self.regressors, self.pooled = regressors, pooled
        folds = torch.arange(len(wanted)) % FOLDS
        given = power = 0.0
        for fold in range(FOLDS):
            self._solve(wanted[folds != fold], seen.rows(folds != fold))
            foretold = self.added(seen.rows(folds == fold)).double()
            given += float((foretold * wanted[folds == fold]).sum())
            power += float(foretold.square().sum())
        self._solve(wanted, seen)
        self.factors *= min(1.0, max(0.0, given / power)) if power > 0 else 0.0

    def _solve(self, wanted: Tensor, seen: Seen) -> None:
        channels = wanted.shape[1]
        design = self.regressors(seen).expand(-1, channels, -1, -1, -1).movedim(2, -1)
        rows = design.transpose(0, 1).flatten(1, -2).double()
        target = wanted.transpose(0, 1).flatten(1).double()[..., None]
        if self.pooled:
            rows, target = rows.flatten(0, 1)[None], target.flatten(0, 1)[None]
        gram = rows.mT @ rows
        gram = gram + RIDGE * torch.diag_embed(gram.diagonal(dim1=1, dim2=2) + 1e-30)
        self.factors = torch.linalg.solve(gram, rows.mT @ target)[..., 0].float()

    def added(self, seen: Seen) -> Tensor:
        design = self.regressors(seen)
        return (design * self.factors[None, :, :, None, None]).sum(2).expand_as(seen.eps)


class Shipped:
    """The terms of `stepwise` itself."""

    def __init__(self, wanted: Tensor, seen: Seen):
        self.terms = fit_terms(wanted, seen.eps, seen.x)

    def added(self, seen: Seen) -> Tensor:
        return self.terms.added(seen.eps, seen.x)


def near(z: Tensor) -> Tensor:
    """The 3 x 3 neighbourhoods of all channels, [N, 9 C, H, W]."""
    return F.unfold(z, 3, padding=1).unflatten(2, z.shape[2:])


def own(*parts: Tensor) -> Tensor:
    """Every channel its own values."""
    return torch.stack(torch.broadcast_tensors(*parts), 2)


def everyone(*parts: Tensor) -> Tensor:
    """Every channel all values, and a constant."""
    return torch.cat([torch.ones_like(parts[0][:, :1]), *parts], 1)[:, None]


def by_value(z: Tensor) -> Tensor:
    """Hat functions of a value, [N, C, KNOTS, H, W]: together they are any function of it that is
    linear between knots, and constant beyond the outer ones."""
    place = (z.clamp(-EDGE, EDGE) + EDGE) * ((KNOTS - 1) / (2 * EDGE))
    knots = torch.arange(KNOTS).reshape(-1, 1, 1)
    return (1 - (place[:, :, None] - knots).abs()).clamp(min=0)


def valued(s: Seen) -> Tensor:
    """Every channel its own values, and a function of the clean latent's."""
    return torch.cat([own(s.eps, s.x), by_value(s.clean)], 2)


CANDIDATES: dict[str, tuple[Regressors, bool]] = {
    "one factor of the prediction (Q-Drift)": (lambda s: own(s.eps), True),
    "one each of prediction and latent (StepbaQ)": (lambda s: own(s.eps, s.x), True),
    "by channel": (lambda s: own(torch.ones_like(s.x), s.eps, s.x), False),
    "by channel and branch": (lambda s: own(torch.ones_like(s.x), *s.branches, s.x), False),
    "by channel and value": (valued, False),
    "across channels": (lambda s: everyone(s.eps, s.x), False),
    "3 x 3 neighbours, across channels": (lambda s: everyone(near(s.eps), near(s.x)), False),
}


class Recorded(Denoiser):
    """A denoiser whose last output, of all branches, is kept."""

    def __init__(self, denoiser: Denoiser):
        super().__init__(denoiser.module, denoiser.step, denoiser.group_bounds)
        self.denoiser = denoiser
        self.last = torch.empty(0)

    def __call__(self, x: Tensor, t: Tensor | float, condition: Mapping[str, Tensor]) -> Tensor:
        self.last = self.denoiser(x, t, condition)
        return self.last


@dataclass(frozen=True)
class Goal:
    """Latents of full precision after each step [S, N, C, H, W], and the steps' responses."""

    after: Tensor
    responses: Sequence[float]


class Fitting(OfflineCorrection):
    """Fits every step of a candidate where goals are given; applies what it has."""

    def __init__(self, make: Callable[[Tensor, Seen], Fit | Shipped], recorded: Recorded):
        self.make, self.recorded = make, recorded
        self.goal: Goal | None = None
        self.fits: list[Fit | Shipped] = []
        self._reached = torch.empty(0)
        self._branches: list[Tensor] = []

    def tries(self, step: StepOf) -> bool:
        return self.goal is not None

    def observe(
        self, step: StepOf, x_next: Tensor, predict: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self._reached = x_next

    def correct(self, step: StepOf, prediction: Tensor) -> Tensor:
        assert step.x is not None
        clean = (step.x - (1 - step.abar_t) ** 0.5 * prediction) / step.abar_t**0.5
        seen = Seen(prediction, step.x, clean, list(self.recorded.last.split(len(prediction))))
        if self.goal is not None:
            wanted = self.goal.after[step.index] - self._reached
            self.fits.append(self.make(wanted / self.goal.responses[step.index], seen))
        return prediction + self.fits[step.index].added(seen)


@click.command(cls=ErrorReportingCommand)
@click.option("--run-dir", metavar="DIR", help="A quantized run (default: the current one).")
@click.option("--num", default=400, show_default=True, help="Samples a row.")
@click.option("--trajectories", type=int, help="Fitted on (default: those that measure noise).")
def main(run_dir: str | None, num: int, trajectories: int | None) -> None:
    """What corrections of a step could gain that have other things to go by than stepwise."""
    run = find_run(run_dir)
    config = load_config(str(run.config))
    model = open_model(config)
    quantized = artifacts.read(run.tensors("quantized"), "quantized")
    cached = config.quantization.cache_time_embeddings
    denoiser = Recorded(InBatches(quantized_denoiser(model, quantized, "auto", cached), 2 * BATCH))
    start, known = config.calibration.seed, config.calibration.noise_trajectories
    seeds = list(range(start, start + (trajectories or known)))
    goal = calibrated(config, model, seeds)
    first = config.sampling.seed
    batches = chunks(list(range(first, first + num)), BATCH)
    expected = torch.cat([trajectory.draw(config, model, full_denoiser(model), b) for b in batches])

    def gains(name: str, make: Callable[[Tensor, Seen], Fit | Shipped] | None) -> list[float]:
        correction = None
        if make is not None:
            correction = Fitting(make, denoiser)
            correction.goal = goal
            trajectory.draw(config, model, denoiser, seeds, correction=correction)
            correction.goal = None
        parts = [
            trajectory.draw(config, model, denoiser, batch, correction=correction)
            for batch in batches
        ]
        latents = torch.cat(parts)
        each = [sqnr_db(a, b) for a, b in zip(expected, latents, strict=True)]
        gain = median(b - a for a, b in zip(plain or each, each, strict=True))
        pooled = sqnr_db(expected, latents)
        click.echo(f"| {name} | {pooled:.2f}; {median(each):.2f} | {gain:+.2f} |")
        return each

    click.echo("| goes by | SQNR, dB: pooled; median | median gain, dB |\n|---|---|---|")
    plain: list[float] = []
    plain = gains("no correction", None)
    for name, (regressors, pooled) in CANDIDATES.items():
        if "branch" in name and not model.guides(config.sampling.guidance_scale):
            continue
        gains(name, lambda wanted, seen, r=regressors, p=pooled: Fit(r, p, wanted, seen))
    gains("by channel and place (`stepwise`)", Shipped)


def calibrated(config: Config, model: DiffusionModel, seeds: Sequence[int]) -> Goal:
    """Where full precision is after each step of these seeds' trajectories."""
    sampling = config.sampling
    scheduler = make_scheduler(sampling.scheduler, model.scheduler_config)
    timed = trajectory.timed_scheduler(config, model)
    plan = plan_steps(timed, sampling.eta)
    parts = []
    for batch in chunks(seeds, BATCH):
        passed: list[Tensor] = []
        recorder = latent_recorder(passed)
        end = trajectory.draw(config, model, full_denoiser(model), batch, on_step=recorder)
        parts.append(goals_of(passed, end, plan, timed))
    answers = responses(scheduler, sampling.steps, sampling.eta)
    return Goal(torch.cat(parts, 1), answers)


if __name__ == "__main__":
    main()
