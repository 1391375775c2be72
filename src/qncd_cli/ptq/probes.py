"""Probes: what layers read on a few calibration trajectories."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.schema import Config
from ..errors import NotFinite
from ..models.loading import DiffusionModel
from ..models.topology import capture_inputs
from ..progress import Track, counted
from ..runtime.denoiser import Denoiser, guided_predict, ticking
from ..sampling.noise import generators_for
from ..sampling.samplers import denoise, make_scheduler
from .layer_plan import LayerPlan

PROBE_TRAJECTORIES = 8
PROBE_STEPS = 10
PROBE_ELEMENTS = 1 << 20
"""Values of a layer's input that are kept."""


@dataclass
class Probe:
    """Inputs of one layer: (timestep, x [n, ...] float32) per denoiser call that was looked at."""

    channel_axis: int
    parts: list[tuple[float, Tensor]]

    def channel_range(self) -> tuple[Tensor, Tensor]:
        """Minimum and maximum per channel, [C] each."""
        flat = [x.movedim(self.channel_axis, 0).flatten(1) for _, x in self.parts]
        low = torch.stack([x.amin(1) for x in flat]).amin(0)
        return low, torch.stack([x.amax(1) for x in flat]).amax(0)


def collect_probes(
    config: Config,
    model: DiffusionModel,
    denoiser: Denoiser,
    plans: list[LayerPlan],
    steps: int,
    track: Track,
) -> dict[str, Probe]:
    """Inputs of every layer at PROBE_STEPS evenly spaced steps of a few trajectories.

    The last step is among them: ranges are widest at either end of a trajectory.
    """
    sampling, calibration = config.sampling, config.calibration
    count = min(PROBE_TRAJECTORIES, calibration.trajectories)
    seeds = list(range(calibration.seed, calibration.seed + count))
    labels = model.labels(seeds, sampling.classes)
    predict = guided_predict(model, denoiser, labels, sampling.guidance_scale)
    kept = {round(i * (steps - 1) / max(1, PROBE_STEPS - 1)) for i in range(PROBE_STEPS)}
    probes = {plan.name: Probe(plan.channel_axis, []) for plan in plans}
    calls = 0

    def receive(name: str, x: Tensor) -> None:
        if calls not in kept:
            return
        rows = max(1, PROBE_ELEMENTS // PROBE_STEPS // x[0].numel())
        picked = x[:: max(1, -(-len(x) // rows))].detach().float().cpu().clone()
        if not torch.isfinite(picked).all():
            t = denoiser.step.timestep
            raise NotFinite(f"the input of layer {name} is not finite at timestep {t:g}")
        probes[name].parts.append((denoiser.step.timestep, picked))

    def numbered(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        prediction = predict(x, t)
        calls += 1
        return prediction

    scheduler = make_scheduler(sampling.scheduler, model.scheduler_config)
    with capture_inputs(model.denoiser, list(probes), receive):
        for batch, tick in counted(track, [seeds], "looking at layers' inputs", steps, "calls"):
            denoise(
                ticking(numbered, tick),
                scheduler,
                sampling.steps,
                generators_for(batch),
                model.latent_shape,
                eta=sampling.eta,
                seeds=batch,
            )
    return probes
