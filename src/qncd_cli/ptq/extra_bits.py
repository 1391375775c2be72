"""Extra bits: finer codes for the few layers whose rounding matters most.

Layers near the output pass their rounding on to the prediction almost whole, and hold a small
share of the weights and of the MACs. Their weights and inputs may have up to two bytes each, in
several passes of 8-bit kernels: all of it stays within integer kernels, and on average within
the extra bits of quantization.sensitive.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..progress import Track, counted, no_progress
from ..quant.affine import QParams, choose_qparams, fake_quantize
from ..quant.observers import choose_range
from ..quant.rounding import weight_qparams
from ..runtime.denoiser import denoiser_costs, timestep_group
from ..spec import FLOAT_BITS, MAX_ACTIVATION_BITS, WIDE_WEIGHT_BITS, activation_spec, weight_spec
from ..store.partial import Partial, Piece
from .cost import HEADROOM, Cost, DenoiserCall
from .job import QuantizationJob
from .layer_plan import LayerPlan, range_observer
from .step_weights import predicted

WEIGHT_WIDTHS = (4, 6, 8, WIDE_WEIGHT_BITS)
ACTIVATION_WIDTHS = (4, 6, 8, MAX_ACTIVATION_BITS)
ROWS_PER_STEP = 4
STEPS = 8
PROJECTIONS = 4
"""Random directions of the output that are looked at per calibration row."""
BACKWARD = 2.0
"""Time of a backward pass over that of a forward one."""
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


def refine(job: QuantizationJob, track: Track = no_progress) -> tuple[list[LayerPlan], Sensitivity]:
    """The plans, the most sensitive layers with more bits for their weights or inputs; and what
    decided it, empty where nothing is to be spent.

    Bits are spent where they remove most error per weight (per MAC for the inputs), up to
    quantization.sensitive's mean extra bits. A budget of bits decides about the weights by itself.
    """
    config, plans = job.config, job.plans
    extra_weight_bits = _extra_weight_bits(config)
    extra_activation_bits = config.quantization.sensitive.activation_bits
    coarse = {p.name: p.weight_bits for p in plans if p.weight_bits <= 8}
    narrow = {p.name: p.activation_bits for p in plans if p.activation_bits <= 8}
    if not (extra_weight_bits and coarse) and not (extra_activation_bits and narrow):
        return plans, Sensitivity()
    concerned = [p for p in plans if p.name in coarse or p.name in narrow]
    found = sensitivity(job.planned(concerned), track)
    sizes = {p.name: p.layer.weight.numel() for p in plans if p.weight_bits != FLOAT_BITS}
    finer = spend(found.weights, coarse, sizes, WEIGHT_WIDTHS, extra_weight_bits)
    macs = {cost.name: cost.macs for cost in denoiser_costs(config, job.model)}
    wider = spend(found.inputs, narrow, macs, ACTIVATION_WIDTHS, extra_activation_bits)
    result = []
    for plan in plans:
        plan = replace(plan, weight_bits=finer.get(plan.name, plan.weight_bits))
        plan = replace(plan, activation_bits=wider.get(plan.name, plan.activation_bits))
        if plan.name in wider and plan.activation_bits > 8:
            plan = replace(plan, observer="minmax")
        result.append(plan)
    return result, found


def spends(config: Config) -> bool:
    """Whether there are extra bits, for weights or for inputs."""
    return bool(_extra_weight_bits(config) or config.quantization.sensitive.activation_bits)


def _extra_weight_bits(config: Config) -> float:
    """Extra bits per weight; none where a budget decides."""
    q = config.quantization
    return q.sensitive.weight_bits if q.weights.budget is None else 0.0


def spend(
    errors: dict[str, float],
    bits: dict[str, int],
    costs: dict[str, int],
    widths: tuple[int, ...],
    extra: float,
) -> dict[str, int]:
    """Bits of every name in `bits`, widened by at most `extra` bits on average over all costs.

    errors: squared errors at `bits`; every bit more divides one by four. The widening that removes
    most error per bit and cost comes first, until none fits: optimal but for the remainder, because
    the error is convex in the bits.
    """
    left = extra * sum(costs.values())
    result = dict(bits)
    steps: list[tuple[float, str, int]] = []

    def propose(name: str) -> None:
        now = result[name]
        wider = next((w for w in widths if w > now), None)
        if wider is None or costs.get(name, 0) <= 0 or errors[name] <= 0:
            return
        error = errors[name] / 4.0 ** (now - bits[name])
        gain = error * (1 - 0.25 ** (wider - now))
        heapq.heappush(steps, (-gain / ((wider - now) * costs[name]), name, wider))

    for name in bits:
        propose(name)
    while steps:
        _, name, wider = heapq.heappop(steps)
        cost = (wider - result[name]) * costs[name]
        if cost <= left:
            left -= cost
            result[name] = wider
            propose(name)
    return result


def sensitivity(job: QuantizationJob, track: Track = no_progress) -> Sensitivity:
    """What rounding each layer's inputs and weight does to the guided prediction.

    To first order the error is J e, J the Jacobian of the prediction and e the rounding error
    (nearest, for weights); E[(v J e)^2] = ||J e||^2 over random v (Hutchinson), and one backward
    pass gives v J for every layer at once. Mean over STEPS timesteps and ROWS_PER_STEP rows. With
    step weights an error is relative to the mean prediction of all steps, and counts as its step.
    """
    model, calibration, plans = job.model, job.calibration, job.plans
    timestep = calibration.tensors["inputs.timestep"]
    times = sorted(set(timestep.tolist()), reverse=True)
    picked = sorted({times[round(i * (len(times) - 1) / (STEPS - 1))] for i in range(STEPS)})
    generator = torch.Generator().manual_seed(0)
    result = Sensitivity(*({p.name: 0.0 for p in plans} for _ in range(2)))
    done = _go_on(job.partial, len(picked), result, generator)
    if done == len(picked):
        return result
    roundings, differences = {}, {}
    for p in track(plans, "rounding inputs and weights", len(plans), "layers"):
        roundings[p.name] = _InputError(job, p)
        differences[p.name] = _weight_error(job, p)
    weights = {p.name: p.layer.weight for p in plans}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        passes = PROJECTIONS * len(picked[done:])
        for t, tick in counted(track, picked[done:], "measuring sensitivity", passes, "passes"):
            rows = (timestep == t).nonzero().flatten()[:ROWS_PER_STEP]
            with torch.enable_grad(), _own_inputs(model.denoiser, list(roundings)) as inputs:
                x = calibration.tensors["inputs.x"][rows].to(model.device, model.dtype)
                labels = calibration.tensors["inputs.class"][rows]
                prediction = predicted(job.config, model, x.requires_grad_(True), labels, t)
            norm = _norm(job, prediction.detach(), t)
            errors = {name: roundings[name](x.detach(), t) for name, x in inputs.items()}
            count = PROJECTIONS * len(picked) * len(rows)
            for i in range(PROJECTIONS):
                v = torch.randn(prediction.shape, generator=generator).to(prediction) / norm
                grads = torch.autograd.grad(
                    prediction,
                    [*inputs.values(), *weights.values()],
                    v,
                    retain_graph=i + 1 < PROJECTIONS,
                    allow_unused=True,
                )
                for name, grad in zip(inputs, grads, strict=False):
                    if grad is not None:
                        product = (grad * errors[name]).double().flatten(1).sum(1)
                        both = product.reshape(-1, len(rows)).sum(0)  # null and class branch
                        result.inputs[name] += float(both.square().sum()) / count
                for name, grad in zip(weights, grads[len(inputs) :], strict=True):
                    if grad is not None:
                        product = (grad * differences[name]).double().sum()
                        result.weights[name] += float(product.square()) / count
                tick()
            done += 1
            job.partial.keep(f"{SUMS}{done}", _sums(result, generator))
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return result


def _sums(so_far: Sensitivity, generator: torch.Generator) -> Piece:
    """What is known after some timesteps, and what is to be drawn next."""
    sums = {
        "inputs": torch.tensor([*so_far.inputs.values()], dtype=torch.float64),
        "weights": torch.tensor([*so_far.weights.values()], dtype=torch.float64),
    }
    return Piece(tensors={**sums, "generator": generator.get_state()})


def _go_on(partial: Partial, most: int, result: Sensitivity, generator: torch.Generator) -> int:
    """Bring result and generator to where an earlier process was; how many timesteps that were."""
    for done in range(most, 0, -1):
        found = partial.take(f"{SUMS}{done}")
        if found is None:
            continue
        for name, table in (("inputs", result.inputs), ("weights", result.weights)):
            table.update(zip(table, found.tensors[name].tolist(), strict=True))
        generator.set_state(found.tensors["generator"])
        return done
    return 0


@contextmanager
def _own_inputs(denoiser: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, each named layer reads its input as a view of its own, kept by name.

    Gradients in a view are those through that layer alone: q, k and v read one tensor, and so do
    a shortcut and the normalization beside it.
    """
    inputs: dict[str, Tensor] = {}
    handles = []
    try:
        for name in names:

            def hook(module, args, name=name):
                if not args[0].requires_grad:
                    return None
                inputs[name] = args[0].view_as(args[0])
                return inputs[name], *args[1:]

            handles.append(denoiser.get_submodule(name).register_forward_pre_hook(hook))
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _weight_error(job: QuantizationJob, plan: LayerPlan) -> Tensor:
    """What nearest rounding adds to a layer's weight, smoothing taken out again."""
    if plan.weight_bits == FLOAT_BITS:
        return torch.zeros_like(plan.layer.weight)
    factor, spec = job.factor(plan.name), weight_spec(plan.weight_bits)
    weight = factor.fold(plan.layer.weight.detach().float().cpu())

    def search() -> Piece:
        return Piece(tensors=weight_qparams(weight, spec)._asdict())

    qparams = QParams(**job.partial.piece(f"{SCALES}{plan.name}", search).tensors)
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


def cost(plans: list[LayerPlan], call: DenoiserCall) -> Cost:
    """One pass forward and PROJECTIONS back for each timestep. plans: of quantized weights."""
    rows = call.copies * ROWS_PER_STEP
    gradients = 2 * sum(p.layer.weight.nbytes for p in plans)  # and the weights' errors
    macs = rows * min(STEPS, call.steps) * call.macs * (1 + BACKWARD * PROJECTIONS)
    return Cost(gradients + rows * call.graph * HEADROOM, macs)
