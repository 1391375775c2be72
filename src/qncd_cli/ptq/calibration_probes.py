"""Probes on calibration inputs: what layers read at a few steps of trajectories that were drawn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config.schema import Config
from ..errors import NotFinite
from ..models.topology import capture_inputs
from ..progress import Track, counted, no_progress
from ..runtime.denoiser import full_denoiser, guided_predict
from ..runtime.kept_calls import KeptCalls
from .cost import Cost, DenoiserCall
from .job import QuantizationJob
from .layer_plan import LayerPlan
from .probes import (
    PROBE_CALLS,
    Probe,
    kept_of_call,
    looked_at_steps,
    probed_trajectories,
    wanted_rows,
)
from .step_weights import predicted

POSITIONS = 1024
"""Positions of one input that are kept of it. Larger: more memory and time for images of more than
32 x 32 positions; smaller: fewer of a large model's outliers are seen."""
SPREAD = (0.7548776662466927, 0.5698402909980532)
"""Steps of the sequence that excerpts are placed by: evenly over the image, however many there are
(Roberts 2018, the R2 sequence)."""


def probes_on_calibration(
    job: QuantizationJob, plans: list[LayerPlan], track: Track = no_progress
) -> dict[str, Probe]:
    """Inputs of every layer at evenly spaced steps of the first trajectories (calibration.effort).

    The last step is among them: ranges are widest at either end of a trajectory. Of a model most of
    whose layers read more than is kept at a step, another trajectory is looked at each time. At
    most POSITIONS positions of an input are kept: its extremes may lie elsewhere. Raises NotFinite
    naming the layer and the timestep.
    """
    config, model, calibration = job.config, job.model, job.calibration
    looks, inputs = config.calibration.looks, calibration.tensors
    timesteps = calibration.body["timesteps"]
    kept = looked_at_steps(looks, len(timesteps))
    # of all layers, whichever share of them is looked at here
    shapes = input_shapes(job, [*calibration.body["layers"]]).values()
    count = trajectories_at_once(config, [math.prod(shape[1:]) for shape in shapes])
    probes = {plan.name: Probe(plan.channel_axis, []) for plan in plans}
    look = 0

    def receive(name: str, picked: Tensor) -> None:
        probes[name].parts.append((calls.step.timestep, picked))

    denoiser = full_denoiser(model)
    calls = KeptCalls(denoiser, job.partial, PROBE_CALLS, receive=receive)

    def see(name: str, x: Tensor) -> None:
        stride = -(-len(x) // wanted_rows(x[0].numel(), looks))
        first = look % stride if count == 1 else 0
        picked = excerpt(x[first::stride].detach(), probes[name].channel_axis, look)
        picked = picked.float().cpu().clone()
        if not torch.isfinite(picked).all():
            t = denoiser.step.timestep
            raise NotFinite(f"the input of layer {name} is not finite at timestep {t:g}")
        calls.saw(name, picked)

    most = probed_trajectories(config)
    with capture_inputs(model.denoiser, list(probes), see):
        for index, tick in counted(track, kept, "looking at layers' inputs", len(kept), "calls"):
            t = timesteps[index]
            rows = (inputs["inputs.timestep"] == t).nonzero().flatten()[:most]
            rows = rows.roll(-look * count)[:count]  # the next ones, or all
            labels = inputs["inputs.class"][rows]
            predict = guided_predict(model, calls, labels, config.sampling.guidance_scale)
            predict(inputs["inputs.x"][rows], torch.tensor(t))
            tick()
            look += 1
    return probes


def input_shapes(job: QuantizationJob, layers: list[str]) -> dict[str, torch.Size]:
    """Shape of what each layer reads of one calibration row; guidance makes two rows of it. A layer
    that is not reached is left out."""
    shapes: dict[str, torch.Size] = {}

    def receive(name: str, x: Tensor) -> None:
        shapes[name] = x.shape

    inputs = job.calibration.tensors
    with torch.no_grad(), capture_inputs(job.model.denoiser, layers, receive):
        x = inputs["inputs.x"][:1].to(job.model.device, job.model.dtype)
        t = float(inputs["inputs.timestep"][0])
        predicted(job.config, job.model, x, inputs["inputs.class"][:1], t)
    return shapes


def trajectories_at_once(config: Config, elements: Sequence[int]) -> int:
    """How many are looked at together: one of a model most of whose layers read more of a row than
    is kept of a call, else all. elements: that each layer reads of a row."""
    looks = config.calibration.looks
    large = elements and statistics.median(elements) > looks.probe_elements // looks.probe_steps
    return 1 if large else probed_trajectories(config)


def excerpt(x: Tensor, channel_axis: int, number: int) -> Tensor:
    """At most POSITIONS positions of x, as a view.

    Of images [n, C, H, W] (channel_axis 1) a part in one piece, of sequences [n, tokens, C]
    (channel_axis -1) tokens at even distances; all of anything else. number: of the excerpt, which
    decides where it lies.
    """
    if channel_axis == 1 and x.ndim == 4:
        height, width = x.shape[2:]
        share = min(1.0, math.sqrt(POSITIONS / (height * width)))
        for axis, (size, step) in enumerate(zip((height, width), SPREAD, strict=True), 2):
            part = max(1, math.floor(size * share))
            x = x.narrow(axis, math.floor((size - part + 1) * (number * step % 1)), part)
        return x
    if channel_axis == -1 and x.ndim == 3:
        every = -(-x.shape[1] // POSITIONS)
        return x[:, number % every :: every]
    return x


def cost(config: Config, plans: list[LayerPlan], call: DenoiserCall) -> Cost:
    """The calls, and what is kept of the plans' inputs."""
    looks = config.calibration.looks
    rows = kept_rows(config, plans, call)
    kept = round(sum(4 * count * call.inputs.get(name, 0) for name, count in rows.items()))
    of_call = call.copies * trajectories_at_once(config, _elements(plans, call))
    macs = (call.copies + of_call * min(looks.probe_steps, call.steps)) * call.macs
    return Cost(kept + call.full_bytes(of_call), kept=kept, model_macs=macs)


def kept_rows(config: Config, plans: list[LayerPlan], call: DenoiserCall) -> dict[str, float]:
    """Rows of each layer's input that its probe holds; a part of one counts as such."""
    looks, elements = config.calibration.looks, _elements(plans, call)
    of_call = call.copies * trajectories_at_once(config, elements)
    steps = min(looks.probe_steps, call.steps)
    return {
        plan.name: steps
        * kept_of_call(of_call, size, looks)
        * min(1.0, POSITIONS * plan.in_channels / size)
        for plan, size in zip(plans, elements, strict=True)
    }


def _elements(plans: list[LayerPlan], call: DenoiserCall) -> list[int]:
    """What each layer reads of a row."""
    return [max(1, call.inputs.get(plan.name, 1)) for plan in plans]
