"""Stage 2: integer weights, activation ranges, noise statistics, coverage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backends.reference import simulate
from ..config.schema import Config
from ..machine import give_back
from ..models.loading import DiffusionModel
from ..progress import Track, no_progress
from ..ptq.attention import quantize_attention
from ..ptq.bit_budget import BitAssignment, assign_bits
from ..ptq.coverage import coverage
from ..ptq.extra_bits import refine
from ..ptq.hessians import with_hessians
from ..ptq.layer_plan import LayerPlan, plan_layers
from ..ptq.noise import measure_noise
from ..ptq.output_ranges import LayerOutput
from ..ptq.probes import collect_probes
from ..ptq.reconstruct import reconstruct
from ..ptq.smoothing_choice import Factors, factors_of
from ..quant.affine import QParams, choose_qparams
from ..quant.layers import QuantizedLayer, StepState
from ..quant.observers import choose_range
from ..quant.packing import pack
from ..quant.rounding import hessian_error, round_gptq, round_nearest
from ..quant.smoothing import SmoothingFactor, fold, shifted_bias
from ..runtime.denoiser import full_denoiser
from ..spec import FLOAT_BITS, activation_spec, weight_spec
from ..store.artifacts import Artifact, seal, tensors_below

MARGIN = 2.0
"""Inputs of more than 8 bits reach this much beyond what calibration saw: room to spare, and an
outlier clipped in the first layer spoils its sample."""


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
) -> QuantizeResult:
    """calibration and smoothing: of this model and configuration (the caller checks that)."""
    factors = factors_of(smoothing)
    plans = [
        plan
        for plan in plan_layers(config, model.denoiser)
        if (not plan.stays_float or plan.name in factors)
        and plan.name in calibration.body["layers"]  # what no input reached stays as it is
    ]
    assigned = BitAssignment({}, {})
    if config.quantization.weights.budget is not None:
        assigned = assign_bits(config, model, calibration, plans, factors, track)
        plans = [replace(p, weight_bits=assigned.bits.get(p.name, p.weight_bits)) for p in plans]
    plans, sensitivity = refine(config, model, calibration, plans, factors, track)
    outputs = layer_outputs(config, model, calibration, plans, factors, track)
    qparams = {
        p.name: input_qparams(p, calibration, config, outputs.get(p.name))
        for p in track(plans, "choosing activation ranges", len(plans), "layers")
    }
    rounding = config.quantization.weights.rounding
    gptq = rounding != "nearest"  # the others start from its codes
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    work = with_hessians(model, config, calibration, plans, qparams, factors, gptq, track)
    for plan, hessian in track(work, "rounding weights", len(plans), "layers"):
        factor = factors.get(plan.name)
        layer_tensors, entry = quantize_layer(plan, qparams[plan.name], factor, hessian)
        if config.quantization.bias_correction:
            correct_bias(plan, layer_tensors, entry, outputs[plan.name], calibration.body["groups"])
        tensors |= {f"{plan.name}.{key}": value for key, value in layer_tensors.items()}
        if plan.name in assigned.sensitivity:
            widths = assigned.sensitivity[plan.name]
            entry["sensitivity"] = {str(bits): value for bits, value in widths.items()}
        if plan.name in sensitivity.inputs:
            entry["estimated_error"] = {
                "input": sensitivity.inputs[plan.name],
                "weight": sensitivity.weights[plan.name],
            }
        entries[plan.name] = entry
        give_back()
    attention_tensors, attention_entries = quantize_attention(config, calibration)
    unsealed = Artifact(
        "quantized",
        tensors | attention_tensors,
        {
            "layers": entries,
            "attention": attention_entries,
            "groups": calibration.body["groups"],
            "group_bounds": calibration.body["group_bounds"],
            "cache_time_embeddings": config.quantization.cache_time_embeddings,
            "source": model.source,
        },
        config.stage_digest("quantize"),
        model.digest,
        {"calibration": calibration.digest, "smoothing": smoothing.digest},
    )
    if rounding in ("adaround", "brecq"):
        unsealed = reconstruct(config, model, calibration, unsealed, track)
    quantized = seal(unsealed)
    noise_stats = measure_noise(config, model, quantized, track)
    return QuantizeResult(quantized, noise_stats, coverage(config, model, quantized))


# ------------------------------------------------------------------ activations


def _extremes(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Least and largest value over all groups of timesteps."""
    seen = state["histogram"].sum(1) > 0
    return state["min"][seen].min(), state["max"][seen].max()


def layer_outputs(
    config: Config,
    model: DiffusionModel,
    calibration: Artifact,
    plans: list[LayerPlan],
    factors: Factors,
    track: Track,
) -> dict[str, LayerOutput]:
    """What judges the output of each layer that asks for it (observer output, bias correction)."""
    asked = [p for p in plans if p.observer == "output" or config.quantization.bias_correction]
    if not asked:
        return {}
    steps = len(calibration.body["timesteps"])
    probes = collect_probes(config, model, full_denoiser(model), asked, steps, track)
    bounds = tuple(calibration.body["group_bounds"])
    return {p.name: LayerOutput(p, probes[p.name], factors.get(p.name), bounds) for p in asked}


def input_qparams(
    plan: LayerPlan, calibration: Artifact, config: Config, output: LayerOutput | None
) -> QParams | None:
    """scale, zero_point [G] of the layer's input, None where it stays float."""
    if plan.activation_bits == FLOAT_BITS:
        return None
    state = tensors_below(f"{plan.name}.input_", calibration.tensors)
    spec = activation_spec(plan.activation_bits)
    percentile = config.quantization.activations.percentile
    if plan.activation_bits > 8:
        low, high = (MARGIN * end.expand(len(state["min"])) for end in _extremes(state))
        return choose_qparams(low, high, spec)
    if plan.observer == "output":
        assert output is not None
        return choose_qparams(*output.ranges(state, percentile), spec)
    low, high = choose_range(state, plan.observer, spec, percentile)
    return choose_qparams(low, high, spec)


# ------------------------------------------------------------------ weights


def quantize_layer(
    plan: LayerPlan,
    qparams: QParams | None,
    factor: SmoothingFactor | None,
    hessian: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The artifact's tensors of one layer (without its name) and its entry in the body."""
    layer = plan.layer
    weight = layer.weight.detach().float().cpu()
    bias = None if layer.bias is None else layer.bias.detach().float().cpu()
    shift = factor.shift if factor is not None else None
    if shift is not None:
        bias = shifted_bias(weight, bias, shift)
    if factor is not None:
        weight = fold(weight, factor.factor)
    entry: dict[str, Any] = {
        "kind": "conv" if plan.is_conv else "linear",
        "weight_shape": list(weight.shape),
        "in_channels": plan.in_channels,
        "weight_bits": plan.weight_bits,
        "activation_bits": plan.activation_bits,
        "observer": plan.observer,
        "smoothed": factor is not None,
        "shifted": shift is not None,
        "bias": bias is not None,
        "bias_corrected": False,
        "rounding": "none",
        "note": "",
    }
    tensors: dict[str, Tensor] = {}
    if plan.weight_bits == FLOAT_BITS:
        tensors["weight"] = weight
    else:
        tensors |= _round_weight(plan, weight, hessian, entry)
    if qparams is not None:
        tensors["input_scale"], tensors["input_zero_point"] = qparams
    if factor is not None:
        tensors["smoothing"] = factor.factor
    if shift is not None:
        tensors["shift"] = shift
    if bias is not None:
        tensors["bias"] = bias
    return tensors, entry


def correct_bias(
    plan: LayerPlan,
    tensors: dict[str, Tensor],
    entry: dict[str, Any],
    output: LayerOutput,
    groups: int,
) -> None:
    """Give a quantized layer back the mean of what its output lost, per timestep group."""
    quantized = QuantizedLayer(
        plan.layer, tensors, plan.weight_bits, plan.activation_bits, StepState(), simulate
    )
    scale, zero_point = tensors.get("input_scale"), tensors.get("input_zero_point")
    qparams = None if scale is None or zero_point is None else QParams(scale, zero_point)
    tensors["bias_correction"] = output.bias_correction(quantized.float_weight(), qparams, groups)
    entry["bias_corrected"] = True


def _round_weight(
    plan: LayerPlan, weight: Tensor, hessian: Tensor | None, entry: dict[str, Any]
) -> dict[str, Tensor]:
    spec = weight_spec(plan.weight_bits)
    if hessian is not None:
        rounded = round_gptq(weight, spec, hessian)
        flat = weight.reshape(len(weight), -1)
        error = hessian_error(flat, rounded.codes.reshape(flat.shape), rounded.qparams, hessian)
        power = ((flat @ hessian) * flat).sum(1).sum()
        entry["relative_output_error"] = float(error.sum() / power) if power > 0 else 0.0
    else:
        rounded = round_nearest(weight, spec)
    entry["rounding"] = "nearest" if hessian is None else "gptq"
    entry["note"] = rounded.note
    tensors = {
        "weight": pack(rounded.codes, plan.weight_bits),
        "weight_scale": rounded.qparams.scale,
    }
    if plan.weight_bits < 8:
        tensors["weight_zero_point"] = rounded.qparams.zero_point.to(torch.uint8)
    return tensors
