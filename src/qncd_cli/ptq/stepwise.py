"""The terms of the step-wise correction, fitted while the quantized model draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config.schema import Config
from ..correction.stepwise import StepwiseFit
from ..models.loading import DiffusionModel
from ..progress import Track, counted
from ..runtime import trajectory
from ..runtime.denoiser import Denoiser
from ..sampling.levels import StepInfo, plan_steps
from ..sampling.noise import chunks
from ..sampling.parametrization import path_scale, prediction_type
from ..sampling.response import responses
from ..sampling.samplers import OnStep, make_scheduler, to_vp
from ..store.artifacts import Artifact


def in_batches(config: Config, model: DiffusionModel, denoiser: Denoiser) -> Denoiser:
    """The denoiser called with the rows of one batch of calibration at most."""
    guides = model.guides(config.sampling.guidance_scale)
    return InBatches(denoiser, config.calibration.batch_size * (2 if guides else 1))


class InBatches(Denoiser):
    """A denoiser that calls another one with at most so many rows."""

    def __init__(self, denoiser: Denoiser, rows: int):
        super().__init__(denoiser.module, denoiser.step, denoiser.group_bounds)
        self.denoiser, self.rows = denoiser, rows

    def __call__(self, x: Tensor, t: Tensor | float, condition: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for start in range(0, len(x), self.rows):
            rows = slice(start, start + self.rows)
            own = {k: v[rows] if len(v) == len(x) else v for k, v in condition.items()}
            parts.append(self.denoiser(x[rows], t, own))
        return torch.cat(parts)


def latent_recorder(passed: list[Tensor]) -> OnStep:
    """on_step that keeps the model's input of every step."""

    def record(index: int, t: Tensor, x: Tensor, prediction: Tensor) -> None:
        passed.append(x.clone())

    return record


def goals_of(
    passed: Sequence[Tensor], end: Tensor, plan: Sequence[StepInfo], scheduler: Any
) -> Tensor:
    """[S, N, C, ...]: latents after every step, in VP scale.

    passed: the model's inputs of a trajectory, end: where it ends, in the scheduler's own scale.
    """
    kind = prediction_type(scheduler)
    later = zip(passed[1:], plan[1:], strict=True)
    reached = [x / path_scale(step.abar_t, kind) for x, step in later]
    return torch.stack([*reached, end * to_vp(scheduler, plan[-1].abar_next, kind)])


def goals_for(
    config: Config,
    model: DiffusionModel,
    calibration: Artifact | None,
    denoiser: Denoiser,
    track: Track,
    most: int | None = None,
) -> tuple[Tensor, list[int]]:
    """`goals_of` trajectories in full precision, [S, N, C, ...], and their N seeds.

    calibration: of this model and sampler, whose trajectories, at most so many, are taken without a
    call; None: a few (calibration.noise_trajectories) are drawn with the denoiser. Raises
    ConfigError for a sampler that `plan_steps` refuses.
    """
    timed = trajectory.timed_scheduler(config, model)
    plan = plan_steps(timed, config.sampling.eta)
    passed: list[Tensor] = []
    if calibration is not None:
        rows, known = calibration.tensors, calibration.tensors["inputs.seed"]
        seeds: list[int] = known.unique().tolist()[:most]
        of_seeds = [rows["inputs.prediction"][known == seed] for seed in seeds]  # step by step
        predictions = iter(torch.stack(of_seeds, 1))
        end = trajectory.draw_with(
            lambda x, t: next(predictions), config, model, seeds, on_step=latent_recorder(passed)
        )
        return goals_of(passed, end, plan, timed), seeds
    settings = config.calibration
    seeds = list(range(settings.seed, settings.seed + settings.noise_trajectories))
    found, batches = [], chunks(seeds, settings.batch_size)
    calls = len(batches) * len(plan)
    for batch, tick in counted(track, batches, "drawing full precision", calls, "steps"):
        passed = []
        on_step = latent_recorder(passed)
        end = trajectory.draw(config, model, denoiser, batch, on_step=on_step, tick=tick)
        found.append(goals_of(passed, end, plan, timed))
    return torch.cat(found, 1), seeds


def fit_stepwise(
    config: Config,
    model: DiffusionModel,
    together: Denoiser,
    goals: Tensor,
    seeds: Sequence[int],
    track: Track,
) -> dict[str, Tensor]:
    """The tensors of `StepwiseCorrection`, from trajectories of these seeds drawn together.

    together: quantized, called with all of them at once (`in_batches`); goals: `goals_of` the same
    seeds in full precision.
    """
    sampling = config.sampling
    scheduler = make_scheduler(sampling.scheduler, model.scheduler_config)
    answers = responses(scheduler, sampling.steps, sampling.eta)
    fit = StepwiseFit(goals, answers, config.correction.inter.field)
    steps = counted(track, [None], "fitting the step-wise correction", sampling.steps, "steps")
    for _, tick in steps:
        trajectory.draw(config, model, together, seeds, correction=fit, tick=tick)
    return fit.statistics()
