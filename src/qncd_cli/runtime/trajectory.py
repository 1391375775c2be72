"""Trajectories: noise denoised into latents by the configured sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..config.schema import Config
from ..models.loading import DiffusionModel
from ..progress import Tick
from ..sampling.levels import visited, with_timesteps
from ..sampling.noise import generators_for
from ..sampling.samplers import Correction, OnStep, Predict, denoise, make_scheduler
from .denoiser import Denoiser, guided_predict


def draw(
    config: Config,
    model: DiffusionModel,
    denoiser: Denoiser,
    seeds: Sequence[int],
    *,
    correction: Correction | None = None,
    on_step: OnStep | None = None,
    tick: Tick | None = None,
) -> Tensor:
    """Latents [N, ...] of a batch of seeds, which have the labels that the configuration says.

    denoiser: the model's own, or what takes its place.
    correction, on_step: as `denoise` has them.
    tick: called after every prediction, those for the correction included.
    Raises what `denoise` and `guided_predict` raise.
    """
    predict = predict_for(config, model, denoiser, seeds, tick)
    return draw_with(predict, config, model, seeds, correction=correction, on_step=on_step)


def draw_with(
    predict: Predict,
    config: Config,
    model: DiffusionModel,
    seeds: Sequence[int],
    *,
    correction: Correction | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latents [N, ...] as `draw` has them, with predictions from anywhere.

    predict: (x [N, ...], t) -> the guided prediction, called once a step, more often for a
    correction; the model gives shapes and the scheduler alone. Raises what `denoise` raises.
    """
    sampling = config.sampling
    return denoise(
        predict,
        make_scheduler(sampling.scheduler, model.scheduler_config),
        sampling.steps,
        generators_for(seeds),
        model.latent_shape,
        eta=sampling.eta,
        correction=correction,
        on_step=on_step,
        seeds=seeds,
        start=_start(config, model, seeds),
        strength=sampling.strength,
    )


def _start(config: Config, model: DiffusionModel, seeds: Sequence[int]) -> Tensor | None:
    """Latents of the images that these seeds begin from; None for noise alone."""
    if model.start is None or config.sampling.strength == 1.0 and model.paints:
        return None
    return model.start(model.labels(list(seeds), config.sampling.classes)).float().cpu()


def predict_for(
    config: Config,
    model: DiffusionModel,
    denoiser: Denoiser,
    seeds: Sequence[int],
    tick: Tick | None = None,
) -> Predict:
    """(x, t) -> the guided prediction with which `draw` denoises these seeds."""
    labels = model.labels(list(seeds), config.sampling.classes)
    predict = guided_predict(model, denoiser, labels, config.sampling.guidance_scale)
    if tick is None:
        return predict

    def ticking(x: Tensor, t: Tensor) -> Tensor:
        prediction = predict(x, t)
        tick()
        return prediction

    return ticking


def timed_scheduler(config: Config, model: DiffusionModel) -> Any:
    """The configured scheduler of diffusers, its timesteps set. Raises ConfigError."""
    sampling = config.sampling
    scheduler = make_scheduler(sampling.scheduler, model.scheduler_config)
    return with_timesteps(scheduler, sampling.steps, sampling.eta, strength=sampling.strength)


def timesteps(config: Config, model: DiffusionModel) -> list[float]:
    """Every timestep that the configured sampler visits, in its order."""
    return [float(t) for t in visited(timed_scheduler(config, model))]
