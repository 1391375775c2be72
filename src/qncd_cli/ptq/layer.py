"""One layer: from its weight to the tensors and the entry of the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..backends.reference import simulate
from ..quant.affine import QParams
from ..quant.gptq import Curvature, asymmetric_target
from ..quant.layers import QuantizedLayer, StepState
from ..quant.packing import pack
from ..quant.rounding import CLIP_FRACTIONS, round_gptq, round_nearest
from ..quant.smoothing import IDENTITY, SmoothingFactor
from ..spec import FLOAT_BITS, weight_spec
from ..store.layer_entry import LayerEntry
from ..store.partial import Piece
from .cost import Cost
from .hessians import hessian_groups
from .job import QuantizationJob
from .layer_plan import LayerPlan
from .output_ranges import LayerOutput

LAYER = "layer "
"""Beginning of the name of a rounded layer in partial results; that of the layer follows."""
ROUNDING_PASSES = 32
"""Passes over a weight for one fraction of the search by squared error (quant.rounding)."""
NEAREST_WEIGHTS = 6
"""Float32 copies of a weight while its scale is searched by squared error."""
GPTQ_MATRICES = 3.1
"""Matrices of a Hessian's size that GPTQ adds to it at its height (two orderings, the
factorisation): the most that scripts/gptq_memory.py showed (2,000 inputs)."""
ERROR_PRODUCTS = 3.5
"""Products of a weight and its Hessian: the errors of both roundings, the power of the output, and
what columns push onto later ones."""


def quantized_layer(
    job: QuantizationJob,
    plan: LayerPlan,
    qparams: QParams | None,
    curvature: Curvature | None,
    outputs: Mapping[str, LayerOutput],
) -> Piece:
    """The artifact's tensors of one layer (without its name) and the body of its entry."""
    config, factor = job.config.quantization, job.factor(plan.name)
    tensors, entry = quantize_layer(plan, qparams, factor, curvature, config.weights.asymmetry)
    if config.bias_correction:
        groups = job.calibration.body["groups"]
        tensors |= correct_bias(plan, tensors, outputs[plan.name], groups)
        entry = replace(entry, bias_corrected=True)
    return Piece(entry.to_body(), tensors)


def quantize_layer(
    plan: LayerPlan,
    qparams: QParams | None,
    factor: SmoothingFactor,
    curvature: Curvature | None,
    asymmetry: float = 0.0,
) -> tuple[dict[str, Tensor], LayerEntry]:
    """The artifact's tensors of one layer (without its name) and its entry.

    curvature: rounding is nearest without it; asymmetry: strength of `asymmetric_target`.
    """
    layer = plan.layer
    weight = layer.weight.detach().float().cpu()
    bias = None if layer.bias is None else layer.bias.detach().float().cpu()
    bias, weight = factor.bias(weight, bias), factor.fold(weight)
    entry = plan.entry(
        smoothed=factor is not IDENTITY,
        shifted=factor.shift is not None,
        rotated=factor.rotation > 0,
    )
    tensors = {"weight": weight}
    if plan.weight_bits != FLOAT_BITS:
        if curvature is not None:
            flat = asymmetric_target(weight.flatten(1), curvature, asymmetry)
            weight = flat.reshape(weight.shape)
        hessian = None if curvature is None else curvature.hessian
        tensors, entry = _round_weight(plan, weight, hessian, entry)
    if qparams is not None:
        tensors["input_scale"], tensors["input_zero_point"] = qparams
    tensors |= factor.tensors()
    if bias is not None:
        tensors["bias"] = bias
    return tensors, entry


def correct_bias(
    plan: LayerPlan, tensors: dict[str, Tensor], output: LayerOutput, groups: int
) -> dict[str, Tensor]:
    """The tensor that gives a layer back the mean of what its output lost, per timestep group.

    tensors: the artifact's of the layer, without its name.
    """
    quantized = QuantizedLayer(
        plan.layer, tensors, plan.weight_bits, plan.activation_bits, StepState(), simulate
    )
    scale, zero_point = tensors.get("input_scale"), tensors.get("input_zero_point")
    qparams = None if scale is None or zero_point is None else QParams(scale, zero_point)
    correction = output.bias_correction(quantized.float_weight(), qparams, groups)
    return {"bias_correction": correction}


def _round_weight(
    plan: LayerPlan, weight: Tensor, hessian: Tensor | None, entry: LayerEntry
) -> tuple[dict[str, Tensor], LayerEntry]:
    """Codes and their scales, and the entry with what rounding says of them."""
    spec = weight_spec(plan.weight_bits)
    if hessian is not None:
        rounded, error = round_gptq(weight, spec, hessian)
        flat = weight.reshape(len(weight), -1)
        power = ((flat @ hessian) * flat).sum(1).sum()
        relative = float(error.sum() / power) if power > 0 else 0.0
        entry = replace(entry, rounding="gptq", relative_output_error=relative)
    else:
        rounded = round_nearest(weight, spec)
        entry = replace(entry, rounding="nearest")
    tensors = {
        "weight": pack(rounded.codes, plan.weight_bits),
        "weight_scale": rounded.qparams.scale,
    }
    if plan.weight_bits < 8:
        tensors["weight_zero_point"] = rounded.qparams.zero_point.to(torch.uint8)
    return tensors, replace(entry, note=rounded.note)


def cost(plans: list[LayerPlan]) -> Cost:
    """Scales of all weights, each searched by squared error. plans: of quantized weights."""
    largest = max((p.layer.weight.numel() for p in plans), default=0)
    return Cost(NEAREST_WEIGHTS * 4.0 * largest, passes=search_passes(plans))


def search_passes(plans: list[LayerPlan]) -> float:
    """Elements that the search of all weights' scales passes over."""
    return float(ROUNDING_PASSES * CLIP_FRACTIONS * sum(p.layer.weight.numel() for p in plans))


def gptq_cost(plans: list[LayerPlan]) -> Cost:
    """The factorisation of each Hessian, the columns one after the other, and three errors.

    Held: the Hessians of a group that are still to come, and GPTQ's own matrices.
    """
    held = macs = 0.0
    for group in hessian_groups(plans):
        sizes = [4.0 * plan.in_features**2 for plan in group]
        for i, size in enumerate(sizes):
            held = max(held, sum(sizes[i:]) + GPTQ_MATRICES * size)
        for plan in group:
            width, outputs = plan.in_features, len(plan.layer.weight)
            macs += width**3 / 6 + ERROR_PRODUCTS * outputs * width**2
    return Cost(held, macs)
