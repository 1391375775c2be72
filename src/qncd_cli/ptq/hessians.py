"""Hessians: for every layer, that of its smoothed and quantized input."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from ..config.effort import Effort
from ..config.schema import Config
from ..models.topology import capture_inputs
from ..progress import Track, no_progress
from ..quant.affine import QParams, fake_quantize, quantize_uint8
from ..quant.gptq import Curvature, HessianAccumulator, kept_bytes
from ..quant.integer_products import fast_in_integers
from ..runtime.denoiser import Denoiser, full_denoiser, guided_predict, timestep_group
from ..spec import FLOAT_BITS, activation_spec
from ..store.artifacts import Artifact, tensors_below
from ..store.partial import Partial, Piece
from .cost import Cost, DenoiserCall
from .job import QuantizationJob
from .layer_plan import LayerPlan
from .prefix import TwofoldDenoiser, before, passes_of

HESSIAN_MEMORY = 4 << 30
"""Bytes of Hessians held at once; more layers take more passes over the calibration inputs."""
CODES = 0.45
"""Time of the sums of products of codes over that of float32's, with VNNI; larger: longer
forecasts. Fitted as `cost.OBSERVING`."""
CODES_IN_FLOATS = 1.2
"""The same without VNNI, where codes become floating-point numbers first
(docs/notebook/2026-11-29-without-vnni.md)."""
SUMS = "hessians"
"""Name in partial results of the Hessians of the layers that are being rounded, as far as they are
added up."""


def with_hessians(
    job: QuantizationJob,
    qparams: dict[str, QParams | None],
    rounded: Mapping[str, Piece],
    track: Track,
    mine: Collection[str] | None = None,
    exchange: Callable[[Sequence[str]], None] | None = None,
) -> Iterator[tuple[list[LayerPlan], dict[str, Curvature]]]:
    """The layers that are not rounded yet, those together whose Hessians are held at once, with
    their curvatures by name; without where rounding is nearest.

    rounded: finished layers; whoever takes layers puts them there before the next come, and layers
    of later passes get their inputs from behind them (weights.passes). Curvatures are the taker's,
    to be given up one by one. mine: names of the layers that this process rounds, None for all;
    exchange: makes others' layers of a pass be rounded, too, given their names.
    """
    plans = [plan for plan in job.plans if mine is None or plan.name in mine]
    weights = job.config.quantization.weights
    gptq = weights.rounding != "nearest"  # the others start from its codes
    wanted = [p for p in job.plans if gptq and p.weight_bits != FLOAT_BITS]
    groups, twofold = [wanted], weights.passes > 1 or weights.asymmetry > 0
    if twofold and wanted:
        groups = passes_of(job, weights.passes)
    for number, group in enumerate(groups):
        prefix = before(groups, number)
        if number and exchange is not None:
            exchange([plan.name for plan in groups[number - 1]])
        own = [plan for plan in group if mine is None or plan.name in mine]
        for part in hessian_groups(own):
            left = [plan for plan in part if plan.name not in rounded]
            if not left:
                continue
            denoiser = full_denoiser(job.model)
            if twofold:
                denoiser = TwofoldDenoiser(job, {n: rounded[n].tensors for n in prefix})
            yield left, collect_hessians(job.planned(left), qparams, track, denoiser)
            job.partial.forget(SUMS)
    yield [plan for plan in plans if plan.name not in rounded], {}


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
    job: QuantizationJob,
    qparams: dict[str, QParams | None],
    track: Track = no_progress,
    denoiser: Denoiser | None = None,
) -> dict[str, Curvature]:
    """Curvature per layer, of its smoothed and quantized input on the calibration rows, each of
    which counts as much as its step. It is kept among the partial results until that is forgotten.

    denoiser: instead of full precision; of a twofold one the second half of rows is the input,
    and the first half what it has drifted from.
    """
    config, model, calibration = job.config, job.model, job.calibration
    by_name = {plan.name: plan for plan in job.plans}
    looks = config.calibration.looks
    batches = hessian_batches(calibration, config.calibration.batch_size, looks.hessian_calls)
    accumulators = {p.name: HessianAccumulator(p.in_features) for p in job.plans}
    denoiser = denoiser or full_denoiser(model)
    twofold = isinstance(denoiser, TwofoldDenoiser)
    bounds, to_see = job.group_bounds, dict.fromkeys(by_name)
    done = _go_on(job.partial, accumulators)

    def sums() -> Piece:
        memories = {name: found.memory() for name, found in accumulators.items()}
        return Piece(done, {f"{n}/{part}": t for n, m in memories.items() for part, t in m.items()})

    def receive(name: str, x: Tensor) -> None:
        plan, parameters = by_name[name], qparams[name]
        rows = rows_per_call(plan, len(batches), looks)
        *full, x = (
            job.factor(name).apply(thinned(part, plan, rows).float(), plan.channel_axis)
            for part in (x.chunk(2) if twofold else [x])
        )
        weight = job.step_weight(denoiser.step.timestep)
        group = timestep_group(denoiser.step.timestep, bounds)
        at_group = None if parameters is None else parameters.at(group)
        if (
            at_group is not None
            and not full
            and plan.activation_bits <= 8
            and x.device.type == "cpu"
        ):
            scale, zero_point = float(at_group.scale), int(at_group.zero_point)
            codes = quantize_uint8(x, scale, zero_point, plan.activation_bits)
            accumulators[name].update_codes(codes, at_group, plan.layer, rows, weight)
        else:
            if at_group is not None:
                x = fake_quantize(x, at_group, activation_spec(plan.activation_bits))
            if weight != 1:
                x, *full = (math.sqrt(weight) * part for part in (x, *full))
            accumulators[name].update(x, plan.layer, rows, *full)
        to_see.pop(name, None)
        if not to_see:
            raise _AllSeen

    with capture_inputs(denoiser.module, list(by_name), receive):
        left = batches[done:]
        for t, picked in track(left, "collecting Hessians", len(left), "calls"):
            to_see = dict.fromkeys(by_name)
            labels = calibration.tensors["inputs.class"][picked]
            predict = guided_predict(model, denoiser, labels, config.sampling.guidance_scale)
            with suppress(_AllSeen):  # what comes behind the last layer need not be computed
                predict(calibration.tensors["inputs.x"][picked], torch.tensor(t))
            done += 1
            if done < len(batches):
                job.partial.keep_states({SUMS: sums})
            else:
                job.partial.write({SUMS: sums})
    return {name: accumulators.pop(name).curvature() for name in by_name}


def _go_on(partial: Partial, accumulators: Mapping[str, HessianAccumulator]) -> int:
    """Let the accumulators go on from what an earlier process has added up; how many calls that
    were. It may have looked at more layers: those that are rounded by now."""
    found = partial.take(SUMS)
    if found is None or any(f"{name}/count" not in found.tensors for name in accumulators):
        return 0
    for name, accumulator in accumulators.items():
        accumulator.restore(tensors_below(f"{name}/", found.tensors))
    return int(found.value)


class _AllSeen(Exception):
    """Every layer that a pass is about has had its input."""


def rows_per_call(plan: LayerPlan, calls: int, looks: Effort) -> int:
    """Input vectors that one denoiser call adds to a layer's Hessian."""
    return -(-wanted_rows(plan, looks) // calls)


def wanted_rows(plan: LayerPlan, looks: Effort) -> int:
    """Input vectors that are enough for a layer's Hessian."""
    return max(looks.hessian_rows, round(looks.hessian_rows_per_input * plan.in_features))


def thinned(x: Tensor, plan: LayerPlan, rows: int) -> Tensor:
    """Enough samples of a batch for so many input vectors, and twice as many to pick them from:
    neighbouring vectors of one image are much alike."""
    vectors_per_sample = max(1, x[0].numel() // plan.in_channels)
    samples = -(-2 * rows // vectors_per_sample)
    return x[:: max(1, len(x) // samples)]


def hessian_batches(
    calibration: Artifact, batch_size: int, calls: int
) -> list[tuple[float, Tensor]]:
    """Batches of row indices, each at one timestep: every timestep, or so many of them."""
    timestep = calibration.tensors["inputs.timestep"]
    times = sorted(set(timestep.tolist()), reverse=True)
    batches = []
    for i, t in enumerate(times[:: -(-len(times) // calls)]):
        parts = (timestep == t).nonzero().flatten().split(batch_size)
        batches.append((t, parts[i % len(parts)]))
    return batches


def cost(config: Config, plans: list[LayerPlan], call: DenoiserCall) -> Cost:
    """The calls, and the outer product of every input vector. plans: of quantized weights.

    At the end each Hessian of a group is held twice, beside the last one of the group before. A
    pass ends at its last layer, of several passes on average halfway; twofold ones see every row
    twice. Drifts are as large as Hessians.
    """
    weights = config.quantization.weights
    twofold = weights.passes > 1 or weights.asymmetry > 0
    batch = min(config.calibration.batch_size, config.calibration.trajectories)
    looks = config.calibration.looks
    rows = min(looks.hessian_calls, call.steps) * batch * call.copies
    groups = hessian_groups(plans)
    calls = weights.passes + 1 if twofold else (len(groups) + 1) / 2
    products = 0.0
    codes = CODES if fast_in_integers() else CODES_IN_FLOATS
    held = last = 0.0
    matrices = 2 if twofold else 1
    for group in groups:
        sizes = [4.0 * matrices * plan.in_features**2 for plan in group]
        held, last = max(held, last + 2 * sum(sizes)), sizes[-1]
        for plan in group:
            positions = call.layer_macs.get(plan.name, 0) / plan.layer.weight.numel()
            vectors = min(rows * positions, wanted_rows(plan, looks))
            exact = not twofold and plan.activation_bits <= 8
            products += (codes if exact else matrices) * vectors * plan.in_features**2
    calling = held / 2 + matrices * call.full_bytes(batch * call.copies)
    sums = [sum(kept_bytes(plan.in_features, drift=twofold) for plan in group) for group in groups]
    return Cost(
        max(held, calling),
        products,
        partial=max(sums, default=0),
        model_macs=float(calls * rows * call.macs),
    )
