"""Hessians: for every layer, that of its smoothed and quantized input."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..config.schema import Config
from ..models.topology import capture_inputs
from ..progress import Track, no_progress
from ..quant.affine import QParams, fake_quantize
from ..quant.gptq import HessianAccumulator
from ..runtime.denoiser import full_denoiser, guided_predict, timestep_group
from ..spec import FLOAT_BITS, activation_spec
from ..store.artifacts import Artifact
from .cost import Cost, DenoiserCall
from .job import QuantizationJob
from .layer_plan import LayerPlan

HESSIAN_MEMORY = 2 << 30
"""Bytes of Hessians held at once; more layers take more passes over the calibration inputs."""
HESSIAN_CALLS = 20
HESSIAN_ROWS = 16384
"""Input vectors in a Hessian, at least, and HESSIAN_ROWS_PER_INPUT for each of its inputs. With a
quarter of them GPTQ fits their noise, and every step's prediction is worse."""
HESSIAN_ROWS_PER_INPUT = 3


def with_hessians(
    job: QuantizationJob, qparams: dict[str, QParams | None], gptq: bool, track: Track
) -> Iterator[tuple[LayerPlan, Tensor | None]]:
    """Every layer with its Hessian, or with None where rounding is to be nearest."""
    rounded = [p for p in job.plans if gptq and p.weight_bits != FLOAT_BITS]
    for group in hessian_groups(rounded):
        hessians = collect_hessians(job.planned(group), qparams, track)
        for plan in group:
            yield plan, hessians.pop(plan.name)
    yield from ((plan, None) for plan in job.plans if plan not in rounded)


def hessian_groups(plans: list[LayerPlan]) -> list[list[LayerPlan]]:
    """Consecutive layers whose Hessians fit into HESSIAN_MEMORY together (at least one)."""
    groups: list[list[LayerPlan]] = []
    used = HESSIAN_MEMORY + 1
    for plan in plans:
        size = 4 * plan.in_features**2
        if used + size > HESSIAN_MEMORY:
            groups.append([])
            used = 0
        groups[-1].append(plan)
        used += size
    return groups


def collect_hessians(
    job: QuantizationJob, qparams: dict[str, QParams | None], track: Track = no_progress
) -> dict[str, Tensor]:
    """Hessian [I, I] per layer, of its smoothed and quantized input on the calibration rows."""
    config, model, calibration = job.config, job.model, job.calibration
    by_name = {plan.name: plan for plan in job.plans}
    batches = hessian_batches(calibration, config.calibration.batch_size)
    accumulators = {p.name: HessianAccumulator(p.in_features) for p in job.plans}
    denoiser = full_denoiser(model)
    bounds = job.group_bounds

    def receive(name: str, x: Tensor) -> None:
        plan, parameters = by_name[name], qparams[name]
        rows = rows_per_call(plan, len(batches))
        x = job.factor(name).apply(thinned(x, plan, rows).float(), plan.channel_axis)
        if parameters is not None:
            group = timestep_group(denoiser.step.timestep, bounds)
            x = fake_quantize(x, parameters.at(group), activation_spec(plan.activation_bits))
        accumulators[name].update(x, plan.layer, rows)

    with capture_inputs(model.denoiser, list(by_name), receive):
        for t, picked in track(batches, "collecting Hessians", len(batches), "calls"):
            labels = calibration.tensors["inputs.class"][picked]
            predict = guided_predict(model, denoiser, labels, config.sampling.guidance_scale)
            predict(calibration.tensors["inputs.x"][picked], torch.tensor(t))
    return {name: accumulator.hessian() for name, accumulator in accumulators.items()}


def rows_per_call(plan: LayerPlan, calls: int) -> int:
    """Input vectors that one denoiser call adds to a layer's Hessian."""
    return -(-wanted_rows(plan) // calls)


def wanted_rows(plan: LayerPlan) -> int:
    """Input vectors that are enough for a layer's Hessian."""
    return max(HESSIAN_ROWS, HESSIAN_ROWS_PER_INPUT * plan.in_features)


def thinned(x: Tensor, plan: LayerPlan, rows: int) -> Tensor:
    """Enough samples of a batch for so many input vectors, and twice as many to pick them from:
    neighbouring vectors of one image are much alike."""
    vectors_per_sample = max(1, x[0].numel() // plan.in_channels)
    samples = -(-2 * rows // vectors_per_sample)
    return x[:: max(1, len(x) // samples)]


def hessian_batches(calibration: Artifact, batch_size: int) -> list[tuple[float, Tensor]]:
    """Batches of row indices, each at one timestep: every timestep, or HESSIAN_CALLS of them."""
    timestep = calibration.tensors["inputs.timestep"]
    times = sorted(set(timestep.tolist()), reverse=True)
    batches = []
    for i, t in enumerate(times[:: -(-len(times) // HESSIAN_CALLS)]):
        parts = (timestep == t).nonzero().flatten().split(batch_size)
        batches.append((t, parts[i % len(parts)]))
    return batches


def cost(config: Config, plans: list[LayerPlan], call: DenoiserCall) -> Cost:
    """The calls, and the outer product of every input vector. plans: of quantized weights.

    At the end each Hessian of a group is held twice, beside the last one of the group before.
    """
    batch = min(config.calibration.batch_size, config.calibration.trajectories)
    rows = min(HESSIAN_CALLS, call.steps) * batch * call.copies
    groups = hessian_groups(plans)
    macs = float(len(groups) * rows * call.macs)
    held = last = 0.0
    for group in groups:
        sizes = [4.0 * plan.in_features**2 for plan in group]
        held, last = max(held, last + 2 * sum(sizes)), sizes[-1]
        for plan in group:
            positions = call.layer_macs.get(plan.name, 0) / plan.layer.weight.numel()
            macs += min(rows * positions, wanted_rows(plan)) * plan.in_features**2
    calling = held / 2 + call.full_bytes(batch * call.copies)
    return Cost(max(held, calling), macs)
