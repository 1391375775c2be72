"""Stage 1: full-precision trajectories, activation statistics, smoothing factors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..artifacts import Artifact, seal
from ..config import Config
from ..models.loading import DiffusionModel
from ..models.topology import (
    capture_inputs,
    is_time_layer,
    smoothing_sites,
    step_embeddings,
    weight_layers,
)
from ..quant.observers import RangeObserver
from ..quant.smoothing import embedding_factor
from ..sampling.noise import chunks, generators_for
from ..sampling.samplers import denoise, make_scheduler
from .assemble import (
    Denoiser,
    Track,
    full_denoiser,
    group_bounds,
    guided_predict,
    no_progress,
    timestep_group,
)


def run(
    config: Config, model: DiffusionModel, track: Track = no_progress
) -> tuple[Artifact, Artifact]:
    """Returns the calibration and the smoothing artifact (not yet written).

    Every trajectory is a function of its own seed; a row of the calibration set is one sample at
    one step: model input x, timestep, class, seed and the full-precision guided prediction.
    """
    digest = config.stage_digest("calibrate")
    denoiser = full_denoiser(model)
    timesteps = sampler_timesteps(config, model)
    factors, described = smoothing_factors(config, model, denoiser, timesteps)
    smoothing = seal(
        Artifact(
            "smoothing",
            {f"{name}.smoothing": factor for name, factor in factors.items()},
            {"layers": described},
            digest,
            model.digest,
        )
    )
    bounds = group_bounds(timesteps, config.quantization.activations.timestep_groups)
    observers = _make_observers(model.denoiser, len(bounds) + 1)

    def observe(name: str, x: Tensor) -> None:
        if name in factors:
            x = x / factors[name].to(x).reshape(1, -1, 1, 1)
        observers[name].update(x, timestep_group(denoiser.step.timestep, bounds))

    with capture_inputs(model.denoiser, list(observers), observe):
        rows = _collect_rows(config, model, denoiser, track)
    tensors = {f"inputs.{name}": value for name, value in rows.items()}
    for name, observer in observers.items():
        tensors |= {f"{name}.input_{part}": v for part, v in observer.state().items()}
    body = {
        "rows": len(rows["seed"]),
        "latent_shape": list(model.latent_shape),
        "groups": len(bounds) + 1,
        "group_bounds": list(bounds),
        "timesteps": timesteps,
        "layers": {name: len(o.channel_absmax) for name, o in observers.items()},
    }
    parents = {"smoothing": smoothing.digest}
    return seal(Artifact("calibration", tensors, body, digest, model.digest, parents)), smoothing


def sampler_timesteps(config: Config, model: DiffusionModel) -> list[float]:
    """Every timestep that the configured sampler visits, in its order."""
    scheduler = make_scheduler(config.sampling.scheduler, model.scheduler_config)
    scheduler.set_timesteps(config.sampling.steps)
    return [float(t) for t in scheduler.timesteps]


def smoothing_factors(
    config: Config, model: DiffusionModel, denoiser: Denoiser, timesteps: list[float]
) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Factor [C_in] and a description of what chose it, per layer that has one.

    Derived from the timestep embeddings of the sampler's steps alone (method.md section 2).
    """
    sites = smoothing_sites(model.denoiser) if config.correction.intra == "embedding" else []
    if not sites:
        return {}, {}
    x = torch.zeros(1, *model.latent_shape)
    labels = model.labels([0], config.sampling.classes)
    condition = model.condition(labels)
    names = [site.projection for site in sites]
    embeddings = step_embeddings(
        model.denoiser,
        names,
        lambda t: denoiser(x, torch.tensor(t), condition),
        sorted(set(timesteps), reverse=True),
    )
    factors, described = {}, {}
    for site in sites:
        norm = model.denoiser.get_submodule(site.norm)
        assert isinstance(norm, nn.GroupNorm)
        embedding = embeddings[site.projection]
        if site.scale_shift:
            embedding = embedding.chunk(2, dim=1)[0]
        factor, clamped = embedding_factor(embedding, norm.weight, norm.num_groups, norm.eps)
        factors[site.layer] = factor
        described[site.layer] = {
            "in_channels": len(factor),
            "chosen": "embedding",
            "clamped": clamped,
        }
    return factors, described


def _make_observers(denoiser: nn.Module, groups: int) -> dict[str, RangeObserver]:
    observers = {}
    for name, layer in weight_layers(denoiser).items():
        if is_time_layer(name):
            continue
        if isinstance(layer, nn.Conv2d):
            observers[name] = RangeObserver(layer.in_channels, 1, groups)
        else:
            observers[name] = RangeObserver(layer.in_features, -1, groups)
    return observers


def _collect_rows(
    config: Config, model: DiffusionModel, denoiser: Denoiser, track: Track
) -> dict[str, Tensor]:
    """Run the trajectories; rows in the order of batch, step, seed."""
    sampling, calibration = config.sampling, config.calibration
    scheduler = make_scheduler(sampling.scheduler, model.scheduler_config)
    seeds = list(range(calibration.seed, calibration.seed + calibration.trajectories))
    parts: dict[str, list[Tensor]] = {
        name: [] for name in ("x", "prediction", "timestep", "class", "seed")
    }
    batches = chunks(seeds, calibration.batch_size)
    for batch in track(batches, "calibrating", len(batches)):
        labels = model.labels(batch, sampling.classes)
        record = _recorder(parts, batch, labels)
        denoise(
            guided_predict(model, denoiser, labels, sampling.guidance_scale),
            scheduler,
            sampling.steps,
            generators_for(batch),
            model.latent_shape,
            eta=sampling.eta,
            on_step=record,
        )
    return {name: torch.cat(values) for name, values in parts.items()}


def _recorder(
    parts: dict[str, list[Tensor]], seeds: list[int], labels: Tensor
) -> Callable[[int, Tensor, Tensor, Tensor], None]:
    def record(index: int, t: Tensor, x: Tensor, prediction: Tensor) -> None:
        parts["x"].append(x.float().clone())
        parts["prediction"].append(prediction.float().clone())
        parts["timestep"].append(torch.full((len(seeds),), float(t)))
        parts["class"].append(labels)
        parts["seed"].append(torch.tensor(seeds, dtype=torch.int64))

    return record
