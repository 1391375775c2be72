"""Stage 2: integer weights, activation ranges, noise statistics, coverage."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..config.schema import Config
from ..machine import give_back
from ..models.loading import DiffusionModel
from ..models.topology import is_first_layer
from ..progress import Track, no_progress
from ..ptq import (
    bit_budget,
    extra_bits,
    first_stage,
    hessians,
    layer,
    noise,
    output_ranges,
    reconstruct,
    reuse,
    sensitivity,
    step_weights,
)
from ..ptq.attention import quantize_attention
from ..ptq.bit_budget import BitAssignment, assign_bits
from ..ptq.calibration_probes import probes_on_calibration
from ..ptq.cost import Cost, DenoiserCall
from ..ptq.coverage import coverage
from ..ptq.extra_bits import refine
from ..ptq.hessians import with_hessians
from ..ptq.job import QuantizationJob
from ..ptq.layer import LAYER, quantized_layer
from ..ptq.layer_plan import LayerPlan, plan_layers
from ..ptq.layer_threads import is_wide, side_by_side
from ..ptq.output_ranges import LayerOutput, judged_by_output
from ..ptq.probes import PROBE_CALLS
from ..ptq.sensitivity import Sensitivity
from ..ptq.smoothing_choice import factors_of
from ..ptq.step_weights import found_step_weights
from ..quant.affine import QParams, choose_qparams
from ..quant.gptq import Curvature
from ..quant.observers import choose_range
from ..runtime.ranks import ALONE, Message, Ranks
from ..spec import FLOAT_BITS, activation_spec
from ..store.artifacts import Artifact, seal
from ..store.layer_entry import EstimatedError, LayerEntry, bodies
from ..store.partial import NOTHING_KEPT, Partial, Piece

MARGIN = 2.0
"""Inputs of more than 8 bits reach this much beyond what calibration saw: room to spare, and an
outlier clipped in the first layer spoils its sample."""
ROUNDING = "rounding weights"
"""The part from which on the result is held."""
DECIDED = ("weight_bits", "activation_bits", "observer")
"""What measurements decide about a layer's plan."""
RANGES = "range "
"""Beginning of names in partial results; that of the layer follows."""


@dataclass(frozen=True)
class QuantizeResult:
    """The stage's outputs; coverage is the content of coverage.json."""

    quantized: Artifact
    noise_stats: Artifact
    coverage: dict[str, Any]


def run(
    config: Config,
    model: DiffusionModel,
    calibration: Artifact,
    smoothing: Artifact,
    track: Track = no_progress,
    partial: Partial = NOTHING_KEPT,
    ranks: Ranks = ALONE,
    also: Collection[str] = (),
) -> QuantizeResult | None:
    """The stage's outputs, on the first rank.

    calibration and smoothing: of this model and configuration (the caller checks that). partial:
    what an earlier process has done; ranks: do their share of the layers each, which depend on each
    other only through what is exchanged. The first alone spends extra bits, learns roundings and
    measures the noise; also: statistics of it beside those that the configuration needs.
    """
    factors = factors_of(smoothing)
    plans = [
        plan
        for plan in plan_layers(config, model.denoiser)
        if (not plan.stays_float or plan.name in factors)
        and plan.name in calibration.body["layers"]  # what no input reached stays as it is
    ]

    def weigh() -> Message:
        return Message([*found_step_weights(config, model, calibration, track, partial).items()])

    weighed = {int(t): float(weight) for t, weight in ranks.told(weigh).value}
    job = QuantizationJob(config, model, calibration, plans, factors, partial, weighed)
    job, assigned, sensitivity = decided(job, track, ranks)
    mine = job.planned([*ranks.share(job.plans)])
    outputs: dict[str, LayerOutput] = {}
    ranges_known = all(partial.has(f"{RANGES}{plan.name}") for plan in mine.plans)
    if config.quantization.bias_correction or not ranges_known:
        outputs = layer_outputs(mine, track)
    qparams = choose_ranges(mine, outputs, track)
    if not config.quantization.bias_correction:
        outputs.clear()
        partial.forget(f"{PROBE_CALLS} ")
    tensors: dict[str, Tensor] = {}
    entries: dict[str, LayerEntry] = {}
    layers = quantized_layers(job, qparams, outputs, track, ranks)
    if not ranks.first:
        return None
    for name, piece in layers.items():
        entry = LayerEntry.from_body(piece.value)
        tensors |= {f"{name}.{key}": value for key, value in piece.tensors.items()}
        if name in sensitivity.inputs:
            estimated = EstimatedError(sensitivity.inputs[name], sensitivity.weights[name])
            entry = replace(entry, estimated_error=estimated)
        entries[name] = replace(entry, sensitivity=assigned.sensitivity.get(name))
    attention_tensors, attention_entries = quantize_attention(config, calibration)
    unsealed = Artifact(
        "quantized",
        tensors | attention_tensors,
        {
            "layers": bodies(entries),
            "attention": bodies(attention_entries),
            "groups": calibration.body["groups"],
            "group_bounds": calibration.body["group_bounds"],
            "cache_time_embeddings": config.quantization.cache_time_embeddings,
            "source": model.source,
        },
        config.stage_digest("quantize"),
        model.digest,
        {"calibration": calibration.digest, "smoothing": smoothing.digest},
    )
    if config.quantization.weights.rounding in ("adaround", "brecq"):
        unsealed = reconstruct.reconstruct(job, unsealed, track)
    quantized = seal(unsealed)
    noise_stats = noise.measure_noise(config, model, quantized, track, partial, also, calibration)
    return QuantizeResult(quantized, noise_stats, coverage(config, model, quantized))


def costs(config: Config, denoiser: nn.Module, call: DenoiserCall) -> dict[str, Cost]:
    """The parts of run by what they do, in their order, each with what it takes; and the plan of
    reuse and the decoder, which come behind it."""
    plans = [p for p in plan_layers(config, denoiser) if not p.stays_float]
    rounded = [p for p in plans if p.weight_bits != FLOAT_BITS]
    weights = config.quantization.weights
    found = {}
    if config.quantization.step_weights > 0:
        found["weighing steps"] = step_weights.cost(config, call)
    if weights.budget is not None:
        found["assigning bits"] = bit_budget.cost(rounded, call)
    if extra_bits.spends(config):
        found["sensitivity"] = sensitivity.cost(rounded, call, config.calibration.looks)
    if judged := judged_by_output(config, plans):
        found["activation ranges"] = output_ranges.cost(config, judged, call)
    found[ROUNDING] = layer.cost(rounded)
    if weights.rounding != "nearest":
        found["Hessians"] = hessians.cost(config, rounded, call)
        found["GPTQ of the widest layers"] = layer.gptq_cost(rounded)
    if weights.rounding in ("adaround", "brecq"):
        found["learning the rounding"] = reconstruct.cost(config, denoiser, rounded, call)
    found["measuring noise"] = noise.cost(config, denoiser, call)
    if config.sampling.reuse is not None:
        found["planning reuse"] = reuse.cost(config, denoiser, call)
    if config.first_stage.bits is not None:
        found["quantizing the decoder"] = first_stage.cost(config, call)
    return found


# ------------------------------------------------------------------ bits


def decided(
    job: QuantizationJob, track: Track, ranks: Ranks
) -> tuple[QuantizationJob, BitAssignment, Sensitivity]:
    """The job with the bits that every layer gets; and what decided it, on the first rank."""
    assigned, found = BitAssignment({}, {}), Sensitivity()
    if job.config.quantization.weights.budget is not None:
        assigned = assign_bits(job, track, ranks)

    def decide() -> Message:
        nonlocal found
        bits = assigned.bits
        plans = [replace(p, weight_bits=bits.get(p.name, p.weight_bits)) for p in job.plans]
        plans, found = refine(job.planned(plans), track)
        return Message([{key: getattr(p, key) for key in DECIDED} for p in plans])

    told = ranks.told(decide).value
    plans = [replace(plan, **what) for plan, what in zip(job.plans, told, strict=True)]
    return job.planned(plans), assigned, found


# ------------------------------------------------------------------ activations


def _extremes(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Least and largest value over all groups of timesteps."""
    seen = state["histogram"].sum(1) > 0
    return state["min"][seen].min(), state["max"][seen].max()


def layer_outputs(job: QuantizationJob, track: Track) -> dict[str, LayerOutput]:
    """What judges the output of each layer that asks for it (observer output, bias correction)."""
    asked = judged_by_output(job.config, job.plans)
    if not asked:
        return {}
    probes = probes_on_calibration(job, asked, track)
    bounds, counts = job.group_bounds, job.step_weight
    return {
        p.name: LayerOutput(p, probes.pop(p.name), job.factor(p.name), bounds, counts)
        for p in asked
    }


def choose_ranges(
    job: QuantizationJob, outputs: dict[str, LayerOutput], track: Track
) -> dict[str, QParams | None]:
    """scale, zero_point [G] of every layer's input by name."""

    def chosen(plan: LayerPlan) -> Piece:
        known = pieces.get(plan.name)
        if known is not None:
            return known
        qparams = input_qparams(job, plan, outputs.get(plan.name))
        return Piece(tensors={} if qparams is None else qparams._asdict())

    kept = {p.name: job.partial.take(f"{RANGES}{p.name}") for p in job.plans}
    pieces = {name: piece for name, piece in kept.items() if piece is not None}
    found: dict[str, QParams | None] = {}
    layers = side_by_side(job.plans, chosen)
    for plan, piece in track(layers, "choosing activation ranges", len(job.plans), "layers"):
        if plan.name not in pieces:
            job.partial.keep(f"{RANGES}{plan.name}", piece)
        found[plan.name] = QParams(**piece.tensors) if piece.tensors else None
    return found


def input_qparams(
    job: QuantizationJob, plan: LayerPlan, output: LayerOutput | None
) -> QParams | None:
    """scale, zero_point [G] of the layer's input, None where it stays float."""
    if plan.activation_bits == FLOAT_BITS:
        return None
    state, spec = job.observed(plan.name), activation_spec(plan.activation_bits)
    percentile = job.config.quantization.activations.percentile
    if plan.activation_bits > 8:
        low, high = (MARGIN * end.expand(len(state["min"])) for end in _extremes(state))
        return choose_qparams(low, high, spec)
    if plan.observer == "output":
        assert output is not None
        return choose_qparams(*output.ranges(state, percentile), spec)
    low, high = choose_range(state, plan.observer, spec, percentile)
    if is_first_layer(plan.name):
        margin = job.config.quantization.first_margin
        low, high = margin * low, margin * high
    return choose_qparams(low, high, spec)


# ------------------------------------------------------------------ weights


def quantized_layers(
    job: QuantizationJob,
    qparams: dict[str, QParams | None],
    outputs: dict[str, LayerOutput],
    track: Track,
    ranks: Ranks = ALONE,
) -> dict[str, Piece]:
    """The artifact's tensors of every layer (without its name) and the body of its entry, on the
    first rank."""
    names = [plan.name for plan in ranks.share(job.plans)]

    def said(some: Collection[str]) -> Message:
        return _message({name: found[name] for name in names if name in some})

    def exchange(some: Sequence[str]) -> None:
        for message in ranks.pooled(said(some)):
            found.update(_pieces(message))

    def layers_with_results() -> Iterator[tuple[LayerPlan, Piece]]:
        for plans, curvatures in with_hessians(job, qparams, found, track, names, exchange):

            def work(plan: LayerPlan, held: dict[str, Curvature] = curvatures) -> Piece:
                curvature = held.pop(plan.name, None)
                return quantized_layer(job, plan, qparams[plan.name], curvature, outputs)

            yield from side_by_side(plans, work, lambda plan: is_wide(plan.in_features))

    found = {n: piece for n in names if (piece := job.partial.take(f"{LAYER}{n}")) is not None}
    left = len(names) - len(found)
    for plan, piece in track(layers_with_results(), ROUNDING, left, "layers"):
        found[plan.name] = piece
        job.partial.keep(f"{LAYER}{plan.name}", piece)
        give_back()
    for message in ranks.gathered(said(names))[1:]:
        found |= _pieces(message)
    return {plan.name: found[plan.name] for plan in job.plans} if ranks.first else {}


def _message(pieces: Mapping[str, Piece]) -> Message:
    tensors = {f"{n}/{key}": t for n, piece in pieces.items() for key, t in piece.tensors.items()}
    return Message({name: piece.value for name, piece in pieces.items()}, tensors)


def _pieces(message: Message) -> dict[str, Piece]:
    found = {name: Piece(value, {}) for name, value in message.value.items()}
    for key, tensor in message.tensors.items():
        name, _, part = key.partition("/")
        found[name].tensors[part] = tensor
    return found
