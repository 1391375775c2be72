"""Measured noise: quantization noise per timestep, and the run-time estimator's baseline."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.base import BACKENDS
from ..config.correction import PAIRS, RUNTIME, STEPWISE
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
from .stepwise import fit_stepwise, goals_for, in_batches

PAIR_CALLS = 2
"""Calls of a denoiser per step: the quantized one, and full precision at its inputs."""
RUNTIME_CALLS = 2
"""Calls more per step for the run-time estimator: its own on both models, but at the last step."""
LOOK = 4
"""Where no correction reads the statistics, one of so many trajectories is drawn for the report.
Larger: a shorter quantize, and curves of the report that wave."""
CARRIED = "carried_from"
"""Key of the body of statistics that are another artifact's: its digest."""


def measure_noise(
    config: Config,
    model: DiffusionModel,
    quantized: Artifact,
    track: Track,
    partial: Partial = NOTHING_KEPT,
    also: Collection[str] = (),
    calibration: Artifact | None = None,
) -> Artifact:
    """Quantization noise per timestep, and what else the configured correction needs.

    Pairs (eps, eps~) are taken along the quantized model's own trajectories, where corrections
    will meet them. RUNTIME: the run-time estimator runs on both models at every step: what it reads
    on the full-precision one is the model's own error, the baseline of docs/method.md; how well it
    foretells the pairs is its gain. STEPWISE: the terms of the step-wise correction come from
    trajectories that already have those of earlier steps, beside calibration's (`goals_for`). Both
    are measured for a correction that reads them (`InterConfig.statistics`), or where also asks for
    them; where nothing reads the pairs either, a few trajectories do. All in eps, whatever the
    model predicts (of rectified flows in the velocity). Where corrections have no meaning
    (`plan_steps`) the artifact holds no timestep, and its body says why.
    """
    scheduler = trajectory.timed_scheduler(config, model)
    wanted = config.correction.inter.statistics.union(also)
    wanted = wanted.union((PAIRS,)) if wanted else wanted
    body = noise_body(config, model.latent_shape, [], wanted)
    try:
        plan = plan_steps(scheduler, config.sampling.eta)
    except ConfigError as refused:
        body |= {"refused": refused.message, "measured": [PAIRS, RUNTIME, STEPWISE]}
        layout = KINDS["noise_stats"].layout(body)
        tensors = {
            name: torch.zeros(shape, dtype=torch_type(type_))
            for name, (type_, shape) in layout.items()
        }
    else:
        tensors = _measure(
            config, model, quantized, scheduler, plan, wanted, track, partial, calibration
        )
        body |= noise_body(config, model.latent_shape, [step.t for step in plan], wanted)
    parents = {"quantized": quantized.digest}
    digest = config.stage_digest("quantize")
    return Artifact("noise_stats", tensors, body, digest, model.digest, parents)


def noise_body(
    config: Config,
    latent_shape: Sequence[int],
    timesteps: Sequence[float],
    measured: Collection[str],
) -> dict[str, Any]:
    """Body of the artifact: what its statistics hold for. timesteps: of every step; measured: of
    PAIRS, RUNTIME and STEPWISE."""
    sampling = config.sampling
    return {
        "channels": latent_shape[0],
        "latent_shape": list(latent_shape),
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
        "measured": sorted(measured),
    }


def _measure(
    config: Config,
    model: DiffusionModel,
    quantized: Artifact,
    scheduler: Any,
    plan: Sequence[StepInfo],
    wanted: Collection[str],
    track: Track,
    partial: Partial,
    calibration: Artifact | None,
) -> dict[str, Tensor]:
    """The artifact's tensors, from the first calibration seeds."""
    settings, kind = config.calibration, prediction_type(scheduler)
    full = KeptCalls(full_denoiser(model), partial, "noise, full precision")
    cache = config.quantization.cache_time_embeddings
    low_memory = not keeps(model.denoiser_bytes())
    backend = fastest(model.device)
    quantized_model = quantized_denoiser(model, quantized, backend, cache, low_memory=low_memory)
    computed = KeptCalls(quantized_model, partial, "noise, quantized")
    statistics = NoiseStatistics()
    own: list[Estimate] = []
    readings: list[tuple[list[Estimate], list[StepError]]] = []
    count, reads = _trajectories(config, wanted), RUNTIME in wanted
    batches = chunks(list(range(settings.seed, settings.seed + count)), settings.batch_size)
    per_step = PAIR_CALLS + (RUNTIME_CALLS + 1) * reads
    calls = len(batches) * (per_step * len(plan) - 2 * reads)
    for batch, tick in counted(track, batches, "measuring quantization noise", calls, "calls"):
        errors: list[StepError] = []
        predict_full = trajectory.predict_for(config, model, full, batch, tick)
        record = pair_recorder(statistics, errors, plan, kind, predict_full)
        if not reads:
            trajectory.draw(config, model, computed, batch, on_step=record, tick=tick)
            continue
        readings.append((_estimates(config, model, computed, batch, tick, record), errors))
        own += _estimates(config, model, full, batch, tick)
    tensors = statistics.finish()
    if STEPWISE in wanted:
        goals, seeds = goals_for(config, model, calibration, full, track)
        together = in_batches(config, model, computed)
        tensors |= fit_stepwise(config, model, together, goals, seeds, track)
    if RUNTIME in wanted:
        tensors |= _of_estimator(model, own, readings, tensors["timesteps"].tolist())
    return tensors


def _trajectories(config: Config, wanted: Collection[str]) -> int:
    """How many are drawn; at least two, if there are as many."""
    most = config.calibration.noise_trajectories
    return most if wanted else min(most, max(2, most // LOOK))


def _of_estimator(
    model: DiffusionModel,
    own: list[Estimate],
    readings: list[tuple[list[Estimate], list[StepError]]],
    timesteps: Sequence[int],
) -> dict[str, Tensor]:
    """runtime_*: what the estimator reads on the model itself, and how well it foretells noise."""
    baseline = EstimatorBaseline.of(own)
    gains = fit_gains(baseline, readings, SLOPE_RATIOS)
    tables: dict[str, Mapping[int, Tensor]] = {
        "mean": baseline.mean,
        "variance": baseline.variance,
        "slope": baseline.slope,
        **{f"{name}_gain": table for name, table in gains.items()},
    }
    unseen = {"mean": torch.zeros(model.latent_shape[0]), "slope": torch.ones(())}
    tensors = {}
    for name, table in tables.items():
        default = unseen.get(name, torch.zeros(()))
        rows = [table.get(t, default).float() for t in timesteps]
        tensors[f"runtime_{name}"] = torch.stack(rows)
    return tensors


def _estimates(
    config: Config,
    model: DiffusionModel,
    denoiser: Denoiser,
    seeds: list[int],
    tick: Tick,
    on_step: OnStep | None = None,
) -> list[Estimate]:
    """The run-time estimator's readings along one batch of trajectories of the denoiser."""
    target = config.correction.inter.target
    generators = generators_for(seeds, "baseline")
    estimator = RuntimeCorrection(generators, target=target, interval=1, apply=False)
    trajectory.draw(
        config, model, denoiser, seeds, correction=estimator, on_step=on_step, tick=tick
    )
    return estimator.estimates


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


def computes_in_integers(denoiser: nn.Module) -> bool:
    """Whether `fastest` is integer kernels. Forecasts, whose denoisers are on the meta device, are
    of the CPU."""
    device = next(denoiser.parameters()).device
    return fastest(torch.device("cpu") if device.type == "meta" else device) == "int8"


def cost(config: Config, denoiser: nn.Module, call: DenoiserCall) -> Cost:
    """Trajectories of both models, the quantized one's weights kept where there is room."""
    calibration = config.calibration
    parameters = sum(p.numel() for p in denoiser.parameters())
    integers = computes_in_integers(denoiser)
    kept = (call.weights / (4 if integers else 1)) if keeps(4 * parameters) else 0
    wanted = config.correction.inter.statistics
    count, reads = _trajectories(config, wanted), RUNTIME in wanted
    batch = call.copies * min(calibration.batch_size, count)
    of_one = call.copies * call.steps * call.macs
    quantized = INTEGERS if integers else SIMULATION
    fitted = calibration.by_size[0] if STEPWISE in wanted else 0
    return Cost(
        kept + call.first_bytes(batch),
        of_one * quantized * (count * (1 + reads) + fitted),
        model_macs=of_one * count * (1 + 2 * reads),
    )
