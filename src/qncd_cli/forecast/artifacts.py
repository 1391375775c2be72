"""Forecast of artifacts: those that a configuration will write, known but for their values.

Tensors are on the meta device; where a description holds a number that only a run can know,
SOME_FLOAT takes as many characters.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch

from ..config.schema import Config
from ..models.smoothing_sites import smoothing_sites
from ..models.topology import attention_sites, skip_boundaries
from ..ptq.attention import quantized_sites
from ..ptq.bit_budget import WIDTHS
from ..ptq.extra_bits import spends
from ..ptq.layer_plan import LayerPlan, has_own_weight_bits, plan_layers
from ..ptq.noise import noise_body
from ..ptq.smoothing_choice import rotated_body
from ..runtime.denoiser import group_bounds
from ..spec import FLOAT_BITS
from ..store.artifacts import KINDS, Artifact, description, torch_type
from ..store.layer_entry import EstimatedError, LayerEntry, Reconstruction, bodies
from .shapes import Shapes

SOME_FLOAT = 0.012345678901234567
"""A number as long as most are in JSON; only its length counts."""
DIGEST, CONTENT = "0" * 16, "0" * 64
_TYPES = {
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def file_bytes(artifact: Artifact) -> int:
    """Bytes that artifacts.write would write: a length, a header of JSON, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"qncd": description(artifact)}}
    end = 0
    for name, tensor in artifact.tensors.items():
        start, end = end, end + tensor.nbytes
        kind, shape = _TYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


def calibration(config: Config, shapes: Shapes, timesteps: list[float]) -> Artifact:
    activations = config.quantization.activations
    bounds = group_bounds(timesteps, activations.timestep_groups)
    body = {
        "rows": config.calibration.by_size[0] * len(timesteps),
        "latent_shape": list(shapes.latent_shape),
        "groups": len(bounds) + 1,
        "group_bounds": list(bounds),
        "timesteps": timesteps,
        "layers": {p.name: p.in_channels for p in plan_layers(config, shapes.denoiser)},
        "attention": {site.name: site.channels for site in attention_sites(shapes.denoiser)},
    }
    return blank("calibration", body, {"smoothing": CONTENT})


def smoothing(config: Config, shapes: Shapes) -> Artifact:
    """The smoothing artifact at its largest: with intra auto every layer may get a factor."""
    plans = plan_layers(config, shapes.denoiser)
    intra = config.correction.intra
    wide = intra in ("smoothquant", "range", "auto")
    smoothed = {plan.name for plan in plans} if wide else set()
    if intra == "embedding":
        smoothed |= {name for site in smoothing_sites(shapes.denoiser) for name in site.layers}
    if config.quantization.split_skip_connections:
        smoothed |= set(skip_boundaries(shapes.denoiser))
    layers = {
        plan.name: {
            "in_channels": plan.in_channels,
            "chosen": intra,
            "clamped": 0,
            "shifted": intra in ("range", "auto") and plan.is_pointwise,
        }
        for plan in plans
        if plan.name in smoothed
    }
    rotated = {p.name: rotated_body(p) for p in plans if p.rotates(config)}
    return blank("smoothing", {"layers": {**rotated, **layers}})


def quantized(config: Config, shapes: Shapes, calibrated: Artifact, factors: Artifact) -> Artifact:
    """The quantized artifact at the configured bits, without those of extra_weight_bits."""
    smoothed = factors.body["layers"]
    plans = [
        plan
        for plan in plan_layers(config, shapes.denoiser)
        if not plan.stays_float or plan.name in smoothed
    ]
    body = {
        "layers": bodies({p.name: _entry(config, p, smoothed.get(p.name)) for p in plans}),
        "attention": bodies(quantized_sites(config, calibrated.body["attention"])),
        "groups": calibrated.body["groups"],
        "group_bounds": calibrated.body["group_bounds"],
        "cache_time_embeddings": config.quantization.cache_time_embeddings,
        "source": shapes.source,
    }
    return blank("quantized", body, {"calibration": CONTENT, "smoothing": CONTENT})


def _entry(config: Config, plan: LayerPlan, factor: dict[str, Any] | None) -> LayerEntry:
    """One layer's entry in the quantized artifact, with SOME_FLOAT for what is measured."""
    q = config.quantization
    shifted = factor is not None and factor["shifted"]
    rotated = factor is not None and factor.get("rotated", False)
    entry = plan.entry(smoothed=factor is not None, shifted=shifted, rotated=rotated)
    entry = replace(entry, bias_corrected=q.bias_correction)
    if spends(config) and min(plan.weight_bits, plan.activation_bits) <= 8:
        entry = replace(entry, estimated_error=EstimatedError(SOME_FLOAT, SOME_FLOAT))
    if q.weights.budget is not None and not has_own_weight_bits(plan, config):
        entry = replace(entry, sensitivity=dict.fromkeys(WIDTHS, SOME_FLOAT))
    if plan.weight_bits == FLOAT_BITS:
        return entry
    if q.weights.rounding == "nearest":
        return replace(entry, rounding="nearest")
    entry = replace(entry, rounding="gptq", relative_output_error=SOME_FLOAT)
    if q.weights.rounding in ("adaround", "brecq"):
        learnt = Reconstruction(plan.name, SOME_FLOAT, SOME_FLOAT, kept=True)
        entry = replace(entry, reconstruction=learnt)
    return entry


def result_bytes(config: Config, shapes: Shapes, predicted: Artifact) -> int:
    """Bytes of quantized.safetensors, with the bits that quantization.sensitive or a budget spends.

    predicted: of quantized().
    """
    spent = extra_weight_bits(config, plan_layers(config, shapes.denoiser))
    return file_bytes(predicted) + spent // 8


def extra_weight_bits(config: Config, plans: list[LayerPlan]) -> int:
    """Bits over all layers that quantization.sensitive or a budget spends beyond the plans' own."""
    q = config.quantization
    sizes = {p.name: p.layer.weight.numel() for p in plans if p.weight_bits != FLOAT_BITS}
    if q.weights.budget is not None:
        own = sum(sizes[p.name] * p.weight_bits for p in plans if p.name in sizes)
        return round(q.weights.budget * sum(sizes.values())) - own
    return round(q.sensitive.weight_bits * sum(sizes.values()))


def extra_input_bits(config: Config, plans: list[LayerPlan]) -> float:
    """Bits of an input that quantization.sensitive spends at most, mean over MACs."""
    wider = any(p.activation_bits <= 8 for p in plans)
    return config.quantization.sensitive.activation_bits if wider else 0.0


def noise_stats(config: Config, shapes: Shapes, timesteps: list[float]) -> Artifact:
    body = noise_body(config, shapes.latent_shape, timesteps, config.correction.inter.statistics)
    return blank("noise_stats", body, {"quantized": CONTENT})


def latents(shapes: Shapes, count: int, traced: int, steps: int) -> Artifact:
    body = {
        "count": count,
        "latent_shape": list(shapes.latent_shape),
        "traced": traced,
        "steps": steps,
        "extra_calls": 0,
    }
    return blank("latents", body)


def blank(kind: str, body: dict[str, Any], parents: dict[str, str] | None = None) -> Artifact:
    """An artifact of a body, on the meta device."""
    tensors = {
        name: torch.empty(shape, dtype=torch_type(type_), device="meta")
        for name, (type_, shape) in KINDS[kind].layout(body).items()
    }
    return Artifact(kind, tensors, body, DIGEST, DIGEST, parents or {}, CONTENT)
