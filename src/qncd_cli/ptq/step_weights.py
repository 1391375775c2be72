"""Step weights: how much an error in a step's prediction changes the end of the trajectory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.schema import Config
from ..correction.statistics import timestep_key
from ..models.loading import DiffusionModel
from ..progress import Track, counted, no_progress
from ..runtime import trajectory
from ..sampling.levels import plan_steps
from ..sampling.parametrization import prediction_type, to_corrected
from ..sampling.response import carried, responses
from ..sampling.samplers import make_scheduler
from ..store.artifacts import Artifact
from ..store.partial import NOTHING_KEPT, Partial, Piece
from .cost import Cost, DenoiserCall

WEIGHED_ROWS = 4
"""Trajectories that are followed back."""
DIRECTIONS = 4
"""Random directions of the end that each is followed back from."""
WEIGHTS = "step weights"
"""Name in partial results."""
BACKWARD = 2.0
"""Time of a backward pass over that of a forward one."""


def found_step_weights(
    config: Config,
    model: DiffusionModel,
    calibration: Artifact,
    track: Track = no_progress,
    partial: Partial = NOTHING_KEPT,
) -> dict[int, float]:
    """Weight of every timestep as the configuration wants it, 1 on average, by `timestep_key`;
    empty where all are to count alike."""
    power = config.quantization.step_weights
    if power == 0:
        return {}

    def make() -> Piece:
        found = step_weights(config, model, calibration, track)
        return Piece({str(t): weight for t, weight in found.items()})

    raised = {int(t): w**power for t, w in partial.piece(WEIGHTS, make).value.items()}
    mean = sum(raised.values()) / max(1, len(raised))
    return {t: weight / mean for t, weight in raised.items()}


def step_weights(
    config: Config, model: DiffusionModel, calibration: Artifact, track: Track = no_progress
) -> dict[int, float]:
    """Weight of every timestep, by `timestep_key`, 1 on average over them.

    A white error of the guided prediction at step t moves the end x_0 by J_t times it, and a
    weight is ||J_t||^2 (Frobenius), from E||v J_t||^2 of random v (Hutchinson). With l_0 = v, a
    and r as `carried` and `responses` give them, J_eps the Jacobian of the prediction,

        l_t = a l_s + r J_eps^T l_s,    v J_t = r l_s

    so that one vector-Jacobian product per step gives both, step by step from the last one. What
    samplers with a memory of predictions take from it later on is left out. Raises ConfigError as
    `plan_steps` does.
    """
    sampling = config.sampling
    scheduler = make_scheduler(sampling.scheduler, model.scheduler_config)
    factors = [of(scheduler, sampling.steps, sampling.eta) for of in (carried, responses)]
    timed = trajectory.timed_scheduler(config, model)
    plan, kind = plan_steps(timed, sampling.eta), prediction_type(timed)
    rows = min(config.calibration.batch_size, config.calibration.trajectories)
    picked = torch.arange(_rows(config))
    generator = torch.Generator().manual_seed(0)
    directions: list[Tensor] = []
    found: dict[int, float] = {}
    steps = list(zip(range(len(plan)), plan, *factors, strict=True))
    work = list(reversed(steps))
    for (number, step, keeps, answers), tick in counted(
        track, work, "weighing steps", len(work), "steps"
    ):
        own = number * rows + picked  # rows lie in the order of batch, step, seed
        with torch.enable_grad():
            x = calibration.tensors["inputs.x"][own].to(model.device, model.dtype)
            x.requires_grad_(True)
            labels = calibration.tensors["inputs.class"][own]
            prediction = predicted(config, model, x, labels, step.t)
            eps = to_corrected(prediction, x, step.abar_t, kind)
        if not directions:
            shape = (DIRECTIONS, *x.shape)
            directions = list(torch.randn(shape, generator=generator).to(eps))
        weight = 0.0
        for i, v in enumerate(directions):
            by_x, by_prediction = torch.autograd.grad(
                eps, (x, prediction), answers * v, retain_graph=i + 1 < DIRECTIONS
            )
            weight += float(by_prediction.double().square().sum())
            directions[i] = keeps * v + by_x.to(v)
        key = timestep_key(step.t)
        found[key] = found.get(key, 0.0) + weight
        tick()
    mean = sum(found.values()) / len(found)
    return {t: weight / mean for t, weight in found.items()} if mean > 0 else {}


def predicted(config: Config, model: DiffusionModel, x: Tensor, labels: Tensor, t: float) -> Tensor:
    """Guided prediction [n, ...] float32 with a graph behind it, for x [n, ...] at timestep t."""
    scale = config.sampling.guidance_scale
    conditions = [model.condition(labels)]
    if model.null_condition is not None and model.guides(scale):
        conditions.insert(0, {**conditions[0], **model.null_condition(len(labels))})
    n = len(conditions)
    condition = {name: torch.cat([c[name] for c in conditions]).detach() for name in conditions[0]}
    for value in condition.values():
        value.requires_grad_(value.is_floating_point())
    x = x.repeat(n, *[1] * (x.ndim - 1))
    times = torch.full((len(x),), t, device=x.device)
    output: Tensor = model.denoiser(x, times, **condition).sample.float()
    if n == 1:
        return output
    null, asked = output.chunk(2)
    return null + scale * (asked - null)


def cost(config: Config, call: DenoiserCall) -> Cost:
    """One pass forward and DIRECTIONS back for each step."""
    rows = call.copies * _rows(config)
    macs = rows * call.steps * call.macs * (1 + BACKWARD * DIRECTIONS)
    return Cost(rows * call.graph, model_macs=macs)


def _rows(config: Config) -> int:
    """Trajectories that are followed back, the first ones of the first batch."""
    return min(WEIGHED_ROWS, config.calibration.batch_size, config.calibration.trajectories)
