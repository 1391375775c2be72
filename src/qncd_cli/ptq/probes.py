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
    seeds = list(range(calibration.seed, calibration.seed + probed_trajectories(config)))
    kept = looked_at_steps(looks, steps)
    probes = {plan.name: Probe(plan.channel_axis, []) for plan in plans}
    step = 0

    def receive(name: str, picked: Tensor) -> None:
        if name in probes:
            probes[name].parts.append((calls.step.timestep, picked))

    calls = KeptCalls(denoiser, partial, PROBE_CALLS, receive=receive)

    def see(name: str, x: Tensor) -> None:
        if step not in kept:
            return
        stride = -(-len(x) // wanted_rows(x[0].numel(), looks))
        picked = x[::stride].detach().float().cpu().clone()
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


def looked_at_steps(looks: Effort, steps: int) -> list[int]:
    """Numbers of the steps whose inputs are kept, of so many."""
    at = looks.probe_steps
    return sorted({round(i * (steps - 1) / max(1, at - 1)) for i in range(at)})


def probed_trajectories(config: Config) -> int:
    """How many trajectories are looked at, the first ones of the calibration."""
    return min(config.calibration.looks.probe_trajectories, config.calibration.trajectories)


def wanted_rows(elements: int, looks: Effort) -> int:
    """Rows of one call that are kept of a layer's input. elements: of it, per row."""
    return max(1, looks.probe_elements // looks.probe_steps // max(1, elements))


def kept_of_call(rows: int, elements: int, looks: Effort) -> int:
    """Rows of a call that are kept of a layer's input, at even distances. rows: of the call;
    elements: of the input, per row."""
    return -(-rows // -(-rows // wanted_rows(elements, looks)))


def cost(config: Config, plans: list[LayerPlan], call: DenoiserCall) -> Cost:
    """The trajectories, and what is kept of the plans' inputs."""
    looks = config.calibration.looks
    rows = probed_trajectories(config) * call.copies
    inputs = (call.inputs.get(plan.name, 0) for plan in plans)
    of_call = sum(4 * kept_of_call(rows, elements, looks) * elements for elements in inputs)
    kept = of_call * min(looks.probe_steps, call.steps)
    macs = rows * call.steps * call.macs
    return Cost(kept + call.full_bytes(rows), kept=kept, model_macs=macs)
