"""Part of stage 2: quantization noise per timestep, and the run-time estimator's baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from ..artifacts import Artifact
from ..config import Config
from ..models.loading import DiffusionModel
from ..quant.noise_correction import RuntimeCorrection, baseline_of
from ..quant.noise_statistics import NoiseStatistics
from ..sampling.noise import chunks, generators_for
from ..sampling.samplers import denoise, make_scheduler
from .assemble import Track, full_denoiser, guided_predict, quantized_denoiser


def measure_noise(
    config: Config, model: DiffusionModel, quantized: Artifact, track: Track
) -> Artifact:
    """Quantization noise per timestep, and what the run-time estimator reads without any.

    Pairs (eps, eps~) are taken along the quantized model's own trajectories, where corrections
    will meet them. The run-time estimator runs on the full-precision model at every step: what
    it reads there is the model's own error, the baseline of method.md section 3.
    """
    sampling, calibration = config.sampling, config.calibration
    scheduler = make_scheduler(sampling.scheduler, model.scheduler_config)
    full = full_denoiser(model)
    cache = config.quantization.cache_time_embeddings
    simulated = quantized_denoiser(model, quantized, "simulate", cache)
    statistics = NoiseStatistics()
    estimates = []
    seeds = list(range(calibration.seed, calibration.seed + calibration.noise_trajectories))
    batches = chunks(seeds, calibration.batch_size)
    for batch in track(batches, "measuring quantization noise", len(batches)):
        labels = model.labels(batch, sampling.classes)
        predict_full = guided_predict(model, full, labels, sampling.guidance_scale)
        predict_quantized = guided_predict(model, simulated, labels, sampling.guidance_scale)

        def pair(index: int, t: Tensor, x: Tensor, eps_q: Tensor, full=predict_full) -> None:
            statistics.update(t, full(x, t), eps_q)

        denoise(
            predict_quantized,
            scheduler,
            sampling.steps,
            generators_for(batch),
            model.latent_shape,
            eta=sampling.eta,
            on_step=pair,
        )
        estimator = RuntimeCorrection(
            generators_for(batch, "baseline"),
            target=config.correction.inter.target,
            interval=1,
            apply=False,
        )
        denoise(
            predict_full,
            scheduler,
            sampling.steps,
            generators_for(batch),
            model.latent_shape,
            eta=sampling.eta,
            correction=estimator,
        )
        estimates += estimator.estimates
    tensors = statistics.finish()
    means, variances = baseline_of(estimates)
    times = tensors["timesteps"].tolist()
    nothing = torch.zeros(model.latent_shape[0])
    tensors["runtime_mean"] = torch.stack([means.get(t, nothing).float() for t in times])
    tensors["runtime_variance"] = torch.stack(
        [variances.get(t, torch.zeros(())).float() for t in times]
    )
    body = {
        "channels": model.latent_shape[0],
        "steps": len(times),
        "sampling": {
            "scheduler": sampling.scheduler,
            "steps": sampling.steps,
            "eta": sampling.eta,
            "guidance_scale": sampling.guidance_scale,
        },
        "target": config.correction.inter.target,
    }
    parents = {"quantized": quantized.digest}
    digest = config.stage_digest("quantize")
    return Artifact("noise_stats", tensors, body, digest, model.digest, parents)
