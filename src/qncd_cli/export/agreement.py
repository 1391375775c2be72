"""How far an exported denoiser is from the simulation of the artifact that it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.schema import Config
from ..models.loading import DiffusionModel
from ..progress import Track, counted
from ..runtime import trajectory
from ..runtime.denoiser import Denoiser


@dataclass(frozen=True)
class Agreement:
    """difference: the largest one of two predictions (infinite where one is not finite);
    prediction: the largest one; images: by name, each [N, C, H, W]."""

    difference: float
    prediction: float
    images: Mapping[str, Tensor]

    @property
    def relative(self) -> float:
        """The difference as a share of the largest prediction."""
        return self.difference / self.prediction


def measure(
    config: Config,
    model: DiffusionModel,
    denoisers: Mapping[str, Denoiser],
    simulated: str,
    exported: str,
    samples: int,
    track: Track,
    what: str,
) -> Agreement:
    """Draw the run's first samples with every denoiser, from the same noise.

    simulated, exported: names among the denoisers; their guided predictions are compared on the
    inputs of the simulated one at every step. what: said of the progress.
    """
    sampling = config.sampling
    seeds = list(range(sampling.seed, sampling.seed + samples))
    predict = trajectory.predict_for(config, model, denoisers[exported], seeds)
    largest = difference = 0.0

    def record(index: int, t: Tensor, x: Tensor, prediction: Tensor) -> None:
        nonlocal largest, difference
        off = (predict(x, t) - prediction).abs().max().item()
        difference = max(difference, off) if off == off else float("inf")
        largest = max(largest, prediction.abs().max().item())

    images = {}
    calls = len(denoisers) * len(trajectory.timesteps(config, model))
    for name, tick in counted(track, list(denoisers), what, calls, "calls"):
        on_step = record if name == simulated else None
        latents = trajectory.draw(config, model, denoisers[name], seeds, on_step=on_step, tick=tick)
        with torch.no_grad():
            images[name] = model.decode(latents)
    return Agreement(difference, largest, images)
