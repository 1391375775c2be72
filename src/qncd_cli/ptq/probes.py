"""Probes: what layers read on a few calibration trajectories."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.effort import Effort
from ..config.schema import Config
from ..errors import NotFinite
from ..models.loading import DiffusionModel
from ..models.topology import capture_inputs
from ..progress import Track, counted
from ..runtime import trajectory
from ..runtime.denoiser import Denoiser
from ..runtime.kept_calls import KeptCalls
from ..store.partial import NOTHING_KEPT, Partial
from .cost import Cost, DenoiserCall
from .layer_plan import LayerPlan

PROBE_CALLS = "probes"
"""Name of the calls in partial results."""


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
    partial: Partial = NOTHING_KEPT,
) -> dict[str, Probe]:
    """Inputs of every layer at evenly spaced steps of a few trajectories (calibration.effort).

    The last step is among them: ranges are widest at either end of a trajectory.
    """
    calibration, looks = config.calibration, config.calibration.looks
    seeds = list(range(calibration.seed, calibration.seed + _trajectories(config)))
    at = looks.probe_steps
    kept = {round(i * (steps - 1) / max(1, at - 1)) for i in range(at)}
    probes = {plan.name: Probe(plan.channel_axis, []) for plan in plans}
    step = 0

    def receive(name: str, picked: Tensor) -> None:
        if name in probes:
            probes[name].parts.append((calls.step.timestep, picked))

    calls = KeptCalls(denoiser, partial, PROBE_CALLS, receive=receive)

    def see(name: str, x: Tensor) -> None:
        if step not in kept:
            return
        picked = x[:: _stride(len(x), x[0].numel(), looks)].detach().float().cpu().clone()
        if not torch.isfinite(picked).all():
            t = denoiser.step.timestep
            raise NotFinite(f"the input of layer {name} is not finite at timestep {t:g}")
        calls.saw(name, picked)

    def predicted(index: int, *_: Tensor) -> None:
        nonlocal step
        step = index + 1

    with capture_inputs(model.denoiser, list(probes), see):
        for batch, tick in counted(track, [seeds], "looking at layers' inputs", steps, "calls"):
            trajectory.draw(config, model, calls, batch, on_step=predicted, tick=tick)
    return probes


def cost(config: Config, plans: list[LayerPlan], call: DenoiserCall) -> Cost:
    """The trajectories, and what is kept of the plans' inputs."""
    kept = sum(4 * kept_rows(config, plan, call) * call.inputs.get(plan.name, 0) for plan in plans)
    rows = _trajectories(config) * call.copies
    return Cost(kept + call.full_bytes(rows), rows * call.steps * call.macs, kept=kept)


def kept_rows(config: Config, plan: LayerPlan, call: DenoiserCall) -> int:
    """Rows of a layer's input that its probe holds."""
    rows, looks = _trajectories(config) * call.copies, config.calibration.looks
    picked = -(-rows // _stride(rows, call.inputs.get(plan.name, 1), looks))
    return min(looks.probe_steps, call.steps) * picked


def _trajectories(config: Config) -> int:
    return min(config.calibration.looks.probe_trajectories, config.calibration.trajectories)


def _stride(rows: int, elements: int, looks: Effort) -> int:
    """Every so many rows of a call are kept. elements: of the input, per row."""
    wanted = max(1, looks.probe_elements // looks.probe_steps // elements)
    return max(1, -(-rows // wanted))
