"""Sensitivity: what rounding each layer's inputs and weight does to the guided prediction.

Memory is that of one pass back of a few rows: the gradient of a layer is used when it comes and
given up, and rounding errors of large models are computed again at every pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config.effort import Effort
from ..progress import Tick, Track, counted, no_progress
from ..quant.affine import QParams, choose_qparams, fake_quantize
from ..quant.observers import choose_range
from ..quant.rounding import weight_qparams
from ..runtime.denoiser import timestep_group
from ..spec import FLOAT_BITS, MAX_ACTIVATION_BITS, activation_spec, weight_spec
from ..store.partial import Partial, Piece
from .calibration_probes import input_shapes
from .cost import Cost, DenoiserCall
from .gradients import Remembered, gradients, other_leaves, own_inputs
from .job import QuantizationJob
from .layer import search_passes
from .layer_plan import LayerPlan, range_observer
from .layer_threads import side_by_side
from .step_weights import predicted

BACKWARD = 2.0
"""Time of a backward pass over that of a forward one."""
BACKWARD_PASSES = 200
"""Passes over what layers read, in a pass forward and in each pass back. Fitted as
`cost.OBSERVING`."""
AT_ONCE = 1 << 26
"""Elements that layers read in one pass: what it keeps for the way back is a few times as much. A
larger value takes more memory, where four rows of a model have more."""
HELD = 1 << 28
"""Bytes of rounding errors that are held between passes, of weights and of inputs each; the others
are computed again. A larger value: less time for models that are larger."""
SUMS = "sensitivity "
"""Beginning of a name in partial results; the number of timesteps that the sums hold follows."""
SCALES = "scales "
"""Beginning of a name in partial results; that of the layer follows."""


@dataclass(frozen=True)
class Sensitivity:
    """Relative squared error of the guided prediction, by layer, that rounding makes in its
    inputs and in its weight."""

    inputs: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)


def sensitivity(job: QuantizationJob, track: Track = no_progress) -> Sensitivity:
    """What rounding each layer's inputs and weight does to the guided prediction.

    To first order the error is J e, J the Jacobian of the prediction and e the rounding error
    (nearest, for weights); E[(v J e)^2] = ||J e||^2 over random v (Hutchinson), and one backward
    pass gives v J for every layer at once. Mean over the timesteps and rows that
    calibration.effort stands for. With step weights an error is relative to the mean prediction of
    all steps, and counts as its step.
    """
    calibration, plans, looks = job.calibration, job.plans, job.config.calibration.looks
    steps, projections = looks.sensitivity_steps, looks.sensitivity_projections
    timestep = calibration.tensors["inputs.timestep"]
    times = sorted(set(timestep.tolist()), reverse=True)
    picked = sorted({times[round(i * (len(times) - 1) / (steps - 1))] for i in range(steps)})
    generator = torch.Generator().manual_seed(0)
    result = Sensitivity(*({p.name: 0.0 for p in plans} for _ in range(2)))
    done = _go_on(job.partial, len(picked), result, generator)
    if done == len(picked):
        return result
    roundings, scales = _roundings(job, track)
    differences = Remembered(HELD, {p.name: partial(_weight_error, job, p, scales) for p in plans})
    weights = {p.name: p.layer.weight for p in plans}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        elements = sum(shape.numel() for shape in input_shapes(job, [*weights]).values())
        at_once = rows_at_once(elements, looks)
        passes = projections * len(picked[done:]) * -(-looks.sensitivity_rows // at_once)
        for t, tick in counted(track, picked[done:], "measuring sensitivity", passes, "passes"):
            rows = (timestep == t).nonzero().flatten()[: looks.sensitivity_rows]
            shape = calibration.tensors["inputs.prediction"][rows].shape
            drawn = [torch.randn(shape, generator=generator) for _ in range(projections)]
            count = projections * len(picked) * len(rows)
            products = [dict.fromkeys(weights, 0.0) for _ in drawn]

            def of_input(name: str, found: Tensor, count: int = count) -> None:
                result.inputs[name] += float(found.square().sum()) / count

            def of_weight(i: int, name: str, grad: Tensor, sums: Any = products) -> None:
                sums[i][name] += float((grad * differences[name]).double().sum())

            parts = zip(*(v.split(at_once) for v in drawn), strict=True)
            for part, directions in zip(rows.split(at_once), parts, strict=True):
                _pass_back(job, t, part, directions, roundings, of_input, of_weight, tick)
            for found in products:
                for name, product in found.items():
                    result.weights[name] += product**2 / count
            done += 1
            job.partial.keep(f"{SUMS}{done}", _sums(result, generator))
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
    return result


def _pass_back(
    job: QuantizationJob,
    t: float,
    rows: Tensor,
    directions: Sequence[Tensor],
    roundings: Mapping[str, _InputError],
    of_input: Callable[[str, Tensor], None],
    of_weight: Callable[[int, str, Tensor], None],
    tick: Tick,
) -> None:
    """Go through the denoiser once with calibration rows at timestep t, and back along directions.

    of_input: receives what a layer's rounded inputs do to each row, double; of_weight: the number
    of a direction and the gradient of a layer's weight.
    """
    calibration, model = job.calibration.tensors, job.model
    weights = {plan.name: plan.layer.weight for plan in job.plans}
    with torch.enable_grad(), own_inputs(model.denoiser, list(roundings)) as inputs:
        x = calibration["inputs.x"][rows].to(model.device, model.dtype)
        labels = calibration["inputs.class"][rows]
        prediction = predicted(job.config, model, x.requires_grad_(True), labels, t)
    norm = _norm(job, prediction.detach(), t)
    errors = Remembered(HELD, {n: partial(roundings[n], y.detach(), t) for n, y in inputs.items()})

    def along_input(name: str, grad: Tensor) -> None:
        product = (grad * errors[name]).double().flatten(1).sum(1)
        of_input(name, product.reshape(-1, len(rows)).sum(0))  # null and class branch

    others = {str(i): leaf for i, leaf in enumerate(other_leaves(prediction, weights))}
    for i, v in enumerate(directions):
        with (
            gradients(inputs, along_input),
            gradients(weights, partial(of_weight, i)),
            gradients(others, lambda name, grad: None),
        ):
            more = i + 1 < len(directions)
            prediction.backward(v.to(prediction) / norm, retain_graph=more)
        tick()


def rows_at_once(elements: int, looks: Effort) -> int:
    """Calibration rows that go through the denoiser together. elements: that its layers read of
    one, guidance counted; the rows of a model are the same on every machine."""
    return max(1, min(looks.sensitivity_rows, AT_ONCE // max(1, elements)))


def _sums(so_far: Sensitivity, generator: torch.Generator) -> Piece:
    """What is known after some timesteps, and what is to be drawn next."""
    sums = {
        "inputs": torch.tensor([*so_far.inputs.values()], dtype=torch.float64),
        "weights": torch.tensor([*so_far.weights.values()], dtype=torch.float64),
    }
    return Piece(tensors={**sums, "generator": generator.get_state()})


def _go_on(kept: Partial, most: int, result: Sensitivity, generator: torch.Generator) -> int:
    """Bring result and generator to where an earlier process was; how many timesteps that were."""
    for done in range(most, 0, -1):
        found = kept.take(f"{SUMS}{done}")
        if found is None:
            continue
        for name, table in (("inputs", result.inputs), ("weights", result.weights)):
            table.update(zip(table, found.tensors[name].tolist(), strict=True))
        generator.set_state(found.tensors["generator"])
        return done
    return 0


def _roundings(
    job: QuantizationJob, track: Track
) -> tuple[dict[str, _InputError], dict[str, QParams | None]]:
    """How each layer's inputs are rounded; and the scales of its weight with smoothing folded in,
    None where it stays float."""
    kept = {p.name: job.partial.take(f"{SCALES}{p.name}") for p in job.plans}

    def work(plan: LayerPlan) -> tuple[_InputError, Piece]:
        known = kept[plan.name]
        return _InputError(job, plan), _weight_scales(job, plan) if known is None else known

    roundings, scales, plans = {}, {}, job.plans
    layers = side_by_side(plans, work)
    for p, found in track(layers, "rounding inputs and weights", len(plans), "layers"):
        roundings[p.name], piece = found
        scales[p.name] = QParams(**piece.tensors) if piece.tensors else None
        if kept[p.name] is None:
            job.partial.keep(f"{SCALES}{p.name}", piece)
    return roundings, scales


def _weight_scales(job: QuantizationJob, plan: LayerPlan) -> Piece:
    if plan.weight_bits == FLOAT_BITS:
        return Piece()
    weight = job.factor(plan.name).fold(plan.layer.weight.detach().float().cpu())
    return Piece(tensors=weight_qparams(weight, weight_spec(plan.weight_bits))._asdict())


def _weight_error(
    job: QuantizationJob, plan: LayerPlan, scales: Mapping[str, QParams | None]
) -> Tensor:
    """What nearest rounding adds to a layer's weight, smoothing taken out again."""
    qparams = scales[plan.name]
    if qparams is None:
        return torch.zeros_like(plan.layer.weight)
    factor, spec = job.factor(plan.name), weight_spec(plan.weight_bits)
    weight = factor.fold(plan.layer.weight.detach().float().cpu())
    error = fake_quantize(weight, qparams, spec) - weight
    return factor.unfold(error).to(plan.layer.weight)


def _norm(job: QuantizationJob, prediction: Tensor, t: float) -> Tensor:
    """What an error of each row is relative to, [n, 1, ...]."""
    norm = prediction.flatten(1).norm(dim=1).clamp(min=1e-15)
    if job.step_weights:
        all_rows = job.calibration.tensors["inputs.prediction"].flatten(1)
        mean = float(all_rows.norm(dim=1).square().mean().sqrt())
        norm = torch.full_like(norm, max(mean, 1e-15) / math.sqrt(max(job.step_weight(t), 1e-15)))
    return norm.reshape(-1, *[1] * (prediction.ndim - 1))


class _InputError:
    """(input of a layer, timestep) -> rounding error of that input, in its own units."""

    def __init__(self, job: QuantizationJob, plan: LayerPlan):
        self.plan, self.factor = plan, job.factor(plan.name)
        self.bounds = job.group_bounds
        self.spec = activation_spec(min(plan.activation_bits, MAX_ACTIVATION_BITS))
        self.exact = plan.activation_bits == FLOAT_BITS
        percentile = job.config.quantization.activations.percentile
        ends = choose_range(
            job.observed(plan.name), range_observer(plan.observer), self.spec, percentile
        )
        self.qparams = choose_qparams(*ends, self.spec)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        if self.exact:
            return torch.zeros_like(x)
        group = timestep_group(t, self.bounds)
        at_group = QParams(*(part.to(x.device) for part in self.qparams.at(group)))
        axis = self.plan.channel_axis
        y = self.factor.apply(x.float(), axis)
        error = fake_quantize(y, at_group, self.spec) - y
        return self.factor.scaled_back(error, axis).to(x.dtype)


def cost(plans: list[LayerPlan], call: DenoiserCall, looks: Effort) -> Cost:
    """One call to see what rows take, and for each timestep a pass forward and some back.

    plans: of quantized weights.
    """
    weights = [p.layer.weight.nbytes for p in plans]
    elements = call.copies * sum(call.inputs.get(p.name, 0) for p in plans)
    at_once = rows_at_once(elements, looks)
    rows = call.copies * at_once
    errors = min(HELD, sum(weights)) + min(HELD, 4 * at_once * elements)
    gradients = 4 * max(weights, default=0)  # of one layer at a time, its weight, error and product
    there_and_back = 1 + BACKWARD * looks.sensitivity_projections
    passes = looks.sensitivity_rows * min(looks.sensitivity_steps, call.steps) * there_and_back
    macs = call.copies * call.macs * (1 + passes)
    looks_at = looks.sensitivity_rows * min(looks.sensitivity_steps, call.steps) * elements
    read = BACKWARD_PASSES * (1 + looks.sensitivity_projections) * looks_at + search_passes(plans)
    return Cost(errors + gradients + rows * call.graph, passes=read, model_macs=macs)
