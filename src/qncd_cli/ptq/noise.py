"""Measured noise: quantization noise per timestep, and the run-time estimator's baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.base import BACKENDS
from ..config.schema import Config
from ..correction.baseline import Estimate, EstimatorBaseline, StepError, fit_gains
from ..correction.runtime import SLOPE_RATIOS, RuntimeCorrection
from ..correction.statistics import NoiseStatistics, timestep_key
from ..correction.stepwise import field_grid
from ..errors import ConfigError
from ..machine import keeps
from ..models.loading import DiffusionModel
from ..progress import Tick, Track, counted
from ..runtime import trajectory
from ..runtime.denoiser import Denoiser, full_denoiser, quantized_denoiser
from ..runtime.kept_calls import KeptCalls
from ..sampling.levels import StepInfo, plan_steps
from ..sampling.noise import chunks, generators_for
from ..sampling.parametrization import prediction_type, to_corrected
from ..sampling.samplers import OnStep, Predict
from ..store.artifacts import KINDS, Artifact, torch_type
from ..store.partial import NOTHING_KEPT, Partial
from .cost import INTEGERS, SIMULATION, Cost, DenoiserCall
from .stepwise import fit_stepwise, goals_of, in_batches, latent_recorder

CALLS_PER_STEP = 5
"""Calls of a denoiser per step, for progress: both models and their estimators (two fewer in all
at the last step), and full precision at the quantized model's inputs."""
CARRIED = "carried_from"
"""Key of the body of statistics that are another artifact's: its digest."""


def measure_noise(
    config: Config,
    model: DiffusionModel,
    quantized: Artifact,
    track: Track,
    partial: Partial = NOTHING_KEPT,
) -> Artifact:
    """Quantization noise per timestep, and what the run-time estimator reads without any.

    Pairs (eps, eps~) are taken along the quantized model's own trajectories, where corrections
    will meet them. The run-time estimator runs on both models at every step: what it reads on the
    full-precision one is the model's own error, the baseline of docs/method.md; how well it
    foretells the pairs is its gain. The terms of the step-wise correction come from trajectories
    that already have those of earlier steps. All in eps, whatever the model predicts (of rectified
    flows in the velocity). Where corrections have no meaning (`plan_steps`) the artifact holds no
    timestep, and its body says why.
    """
    scheduler = trajectory.timed_scheduler(config, model)
    body = noise_body(config, model.latent_shape, [])
    try:
        plan = plan_steps(scheduler, config.sampling.eta)
    except ConfigError as refused:
        body["refused"] = refused.message
        layout = KINDS["noise_stats"].layout(body)
        tensors = {
            name: torch.zeros(shape, dtype=torch_type(type_))
            for name, (type_, shape) in layout.items()
        }
    else:
        tensors = _measure(config, model, quantized, scheduler, plan, track, partial)
        body |= noise_body(config, model.latent_shape, [step.t for step in plan])
    parents = {"quantized": quantized.digest}
    digest = config.stage_digest("quantize")
    return Artifact("noise_stats", tensors, body, digest, model.digest, parents)


def noise_body(
    config: Config, latent_shape: Sequence[int], timesteps: Sequence[float]
) -> dict[str, Any]:
    """Body of the artifact: what its statistics hold for. timesteps: of every step."""
    sampling = config.sampling
    return {
        "channels": latent_shape[0],
        "grid": list(field_grid(latent_shape[1:], config.correction.inter.field)),
        "steps": len({timestep_key(t) for t in timesteps}),
        "sampler_steps": len(timesteps),
        "sampling": {
            "scheduler": sampling.scheduler,
            "steps": sampling.steps,
            "eta": sampling.eta,
            "guidance_scale": sampling.guidance_scale,
        },
        "target": config.correction.inter.target,
    }


def _measure(
    config: Config,
    model: DiffusionModel,
    quantized: Artifact,
    scheduler: Any,
    plan: Sequence[StepInfo],
    track: Track,
    partial: Partial,
) -> dict[str, Tensor]:
    """The artifact's tensors, from the first calibration seeds."""
    calibration, kind = config.calibration, prediction_type(scheduler)
    full = KeptCalls(full_denoiser(model), partial, "noise, full precision")
    cache = config.quantization.cache_time_embeddings
    low_memory = not keeps(model.denoiser_bytes())
    backend = fastest(model.device)
    quantized_model = quantized_denoiser(model, quantized, backend, cache, low_memory=low_memory)
    computed = KeptCalls(quantized_model, partial, "noise, quantized")
    statistics = NoiseStatistics()
    own: list[Estimate] = []
    goals: list[Tensor] = []
    readings: list[tuple[list[Estimate], list[StepError]]] = []
    seeds = list(range(calibration.seed, calibration.seed + calibration.noise_trajectories))
    batches = chunks(seeds, calibration.batch_size)
    calls = len(batches) * (CALLS_PER_STEP * len(plan) - 2)
    for batch, tick in counted(track, batches, "measuring quantization noise", calls, "calls"):
        errors: list[StepError] = []
        predict_full = trajectory.predict_for(config, model, full, batch, tick)
        record = pair_recorder(statistics, errors, plan, kind, predict_full)
        estimates, _ = _estimates(config, model, computed, batch, tick, on_step=record)
        readings.append((estimates, errors))
        passed: list[Tensor] = []
        estimates, end = _estimates(
            config, model, full, batch, tick, on_step=latent_recorder(passed)
        )
        own += estimates
        goals.append(goals_of(passed, end, plan, scheduler))
    tensors = statistics.finish()
    together = in_batches(config, model, computed)
    tensors |= fit_stepwise(config, model, together, torch.cat(goals, 1), seeds, track)
    baseline = EstimatorBaseline.of(own)
    gains = fit_gains(baseline, readings, SLOPE_RATIOS)
    tables: dict[str, Mapping[int, Tensor]] = {
        "mean": baseline.mean,
        "variance": baseline.variance,
        "slope": baseline.slope,
        **{f"{name}_gain": table for name, table in gains.items()},
    }
    unseen = {"mean": torch.zeros(model.latent_shape[0]), "slope": torch.ones(())}
    for name, table in tables.items():
        default = unseen.get(name, torch.zeros(()))
        rows = [table.get(t, default).float() for t in tensors["timesteps"].tolist()]
        tensors[f"runtime_{name}"] = torch.stack(rows)
    return tensors


def _estimates(
    config: Config,
    model: DiffusionModel,
    denoiser: Denoiser,
    seeds: list[int],
    tick: Tick,
    on_step: OnStep | None = None,
) -> tuple[list[Estimate], Tensor]:
    """The run-time estimator's readings along one batch of trajectories of the denoiser, and where
    these end."""
    target = config.correction.inter.target
    generators = generators_for(seeds, "baseline")
    estimator = RuntimeCorrection(generators, target=target, interval=1, apply=False)
    end = trajectory.draw(
        config, model, denoiser, seeds, correction=estimator, on_step=on_step, tick=tick
    )
    return estimator.estimates, end


def pair_recorder(
    statistics: NoiseStatistics,
    errors: list[StepError],
    plan: Sequence[StepInfo],
    kind: str,
    predict_full: Predict,
) -> OnStep:
    """on_step that adds (eps, eps~) at the quantized trajectory's own inputs to both records.

    kind: what both models predict; plan: of the sampler whose steps are recorded.
    """

    def record(index: int, t: Tensor, x: Tensor, prediction: Tensor) -> None:
        predictions = predict_full(x, t), prediction
        eps, eps_q = (to_corrected(p, x, plan[index].abar_t, kind) for p in predictions)
        statistics.update(t, eps, eps_q)
        errors.append(StepError.of(timestep_key(t), index, eps, eps_q))

    return record


def fastest(device: torch.device) -> str:
    """The backend that computes the quantized model in the least time: integer kernels, which give
    the numbers of the simulation, or that where they are not to be had."""
    return "int8" if not BACKENDS["int8"].why_unavailable(device) else "simulate"


def cost(config: Config, denoiser: nn.Module, call: DenoiserCall) -> Cost:
    """Trajectories of both models, the quantized one's weights kept where there is room."""
    calibration = config.calibration
    parameters = sum(p.numel() for p in denoiser.parameters())
    kept = call.weights if keeps(4 * parameters) else 0
    batch = call.copies * min(calibration.batch_size, calibration.noise_trajectories)
    rows = calibration.noise_trajectories * call.copies * call.steps
    device = next(denoiser.parameters()).device
    quantized = INTEGERS if fastest(device) == "int8" else SIMULATION
    calls = 3 * quantized + 3  # of CALLS_PER_STEP, and one of fit_stepwise
    return Cost(kept + call.first_bytes(batch), rows * call.macs * calls)
