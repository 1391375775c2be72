"""The kinds of artifacts: which tensors a file of each kind holds, as its body announces them.

Tensor names (G timestep groups, R calibration rows, T timesteps, C channels):

| kind | tensors | body |
|---|---|---|
| calibration | inputs.{x, prediction} [R, C, ...], inputs.{timestep, class, seed} [R]; per layer .input_{min, max, batch_min, batch_max} [G], .input_histogram [G, BINS], .input_histogram_exponent [G], .input_channel_absmax [C_in]; per attention module the same with query, key and value for input | rows, latent_shape, groups, layers {name: in_channels}, attention {name: channels}, timesteps |
| smoothing | per layer .smoothing [C_in], .shift [C_in] where shifted, .rotation [1] where rotated | layers {name: {in_channels, chosen, clamped, shifted, rotated}} |
| quantized | per layer .weight (codes; per output channel one bit stream along the flattened input dimension, lowest bit first: two 4-bit codes to a byte, low nibble first), .weight_scale [O], .weight_zero_point [O] (below 8 bits), .input_scale, .input_zero_point [G], .smoothing, .shift [C_in], .rotation [1], .bias [O], .bias_correction [G, O]; per attention module .{query, key, value}_{scale, zero_point} [G] | layers {name: LayerEntry}, attention {name: AttentionEntry}, groups, group_bounds |
| noise_stats | timesteps [T], mean, variance, residual_mean, affine_a, affine_b, affine_mean, runtime_mean [T, C], correlation_k, residual_variance, affine_variance, runtime_variance, runtime_slope, runtime_tensor_gain, runtime_channel_gain, runtime_slope_gain [T]; stepwise_prediction, stepwise_latent [S, C], stepwise_field [S, C, *grid] | channels, steps, sampler_steps, grid, sampling, target |
| first_stage | of the decoder of latents, as in quantized with one group: per layer .weight, .weight_scale, .input_scale, .input_zero_point, .bias; per attention module .{query, key, value}_{scale, zero_point} | layers {name: LayerEntry}, attention {name: AttentionEntry}, groups 1, group_bounds [], macs and integer_macs of an image |
| text_encoders | of the text encoders' linear layers, as in quantized with one group: per layer .weight, .weight_scale, .weight_zero_point, .input_scale, .input_zero_point, .smoothing, .bias | layers {name: LayerEntry}, attention {}, groups 1, group_bounds [], bits, float_bytes of the layers in float32, prompts that were looked at, fidelity {embedding: {sqnr_db, sqnr_lowest_db}} |
| reuse | per site <site>.{factor, slope, offset} [S, B, C]; stepwise_* as in noise_stats where the prediction is mended too (channels > 0) | timesteps of the S steps, kept [[site]] by step, chains [[site]], share of MACs, sites {name: C}, branches B, correction, channels, grid, sampling |
| latents | latents [N, C, ...], seeds, classes [N]; predictions [K, S, C, ...], prediction_seeds [K] of the first K seeds | count, latent_shape, traced, steps, extra_calls |
| features | features, logits, spatial [N, W] of N images (metrics/kept_features.py) | network, count, size [H, W], seen {digests, colours, brightest}, widths {tensor: W} |
| partial | `<piece>/<name>`: whatever a stage has done so far (store/partial.py) | made_from, pieces {name: {value, tensors {name: [type, shape]}}} |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..spec import ATTENTION_OPERANDS, FLOAT_BITS
from .layer_entry import attention_entries, layer_entries

HISTOGRAM_BINS = 2048
FLOAT32, INT64, INT32, INT16 = "torch.float32", "torch.int64", "torch.int32", "torch.int16"
INT8, UINT8 = "torch.int8", "torch.uint8"
"""Types as torch spells them; torch is not needed for that."""
Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Type and shape of every tensor by name."""


def packed_width(in_features: int, bits: int) -> int:
    """Bytes of one output channel's codes: one stream of bits, filled up to a whole byte, or two
    bytes for each code."""
    return 2 * in_features if bits > 8 else -(-in_features * bits // 8)


def _code_layout(out: int, in_features: int, bits: int) -> tuple[str, tuple[int, ...]]:
    if bits > 8:
        return INT16, (out, in_features)
    return INT8 if bits == 8 else UINT8, (out, packed_width(in_features, bits))


def _calibration_layout(body: dict) -> Layout:
    rows, latent, groups = body["rows"], tuple(body["latent_shape"]), body["groups"]
    layout: Layout = {
        "inputs.x": (FLOAT32, (rows, *latent)),
        "inputs.prediction": (FLOAT32, (rows, *latent)),
        "inputs.timestep": (FLOAT32, (rows,)),
        "inputs.class": (INT64, (rows,)),
        "inputs.seed": (INT64, (rows,)),
    }
    observed = {f"{name}.input": channels for name, channels in body["layers"].items()}
    for name, channels in body["attention"].items():
        observed |= {f"{name}.{operand}": channels for operand in ATTENTION_OPERANDS}
    for name, channels in observed.items():
        for part in ("min", "max", "batch_min", "batch_max"):
            layout[f"{name}_{part}"] = (FLOAT32, (groups,))
        layout[f"{name}_histogram"] = (INT64, (groups, HISTOGRAM_BINS))
        layout[f"{name}_histogram_exponent"] = (INT64, (groups,))
        layout[f"{name}_channel_absmax"] = (FLOAT32, (channels,))
    return layout


def _smoothing_layout(body: dict) -> Layout:
    layout: Layout = {}
    for name, entry in body["layers"].items():
        channels = (FLOAT32, (entry["in_channels"],))
        layout[f"{name}.smoothing"] = channels
        if entry["shifted"]:
            layout[f"{name}.shift"] = channels
        if entry.get("rotated"):
            layout[f"{name}.rotation"] = (INT32, (1,))
    return layout


def _quantized_layout(body: dict) -> Layout:
    groups = body["groups"]
    layout: Layout = {}
    for name, entry in layer_entries(body).items():
        out, bits = entry.weight_shape[0], entry.weight_bits
        channels = (FLOAT32, (entry.in_channels,))
        if bits == FLOAT_BITS:
            layout[f"{name}.weight"] = (FLOAT32, entry.weight_shape)
        else:
            layout[f"{name}.weight"] = _code_layout(out, entry.in_features, bits)
            layout[f"{name}.weight_scale"] = (FLOAT32, (out,))
            if bits < 8:
                layout[f"{name}.weight_zero_point"] = (UINT8, (out,))
        if entry.activation_bits != FLOAT_BITS:
            layout[f"{name}.input_scale"] = (FLOAT32, (groups,))
            layout[f"{name}.input_zero_point"] = (INT32, (groups,))
        if entry.smoothed:
            layout[f"{name}.smoothing"] = channels
        if entry.shifted:
            layout[f"{name}.shift"] = channels
        if entry.rotated:
            layout[f"{name}.rotation"] = (INT32, (1,))
        if entry.bias:
            layout[f"{name}.bias"] = (FLOAT32, (out,))
        if entry.bias_corrected:
            layout[f"{name}.bias_correction"] = (FLOAT32, (groups, out))
    for name, products in attention_entries(body).items():
        for operand in ATTENTION_OPERANDS if products.bits != FLOAT_BITS else ():
            layout[f"{name}.{operand}_scale"] = (FLOAT32, (groups,))
            layout[f"{name}.{operand}_zero_point"] = (INT32, (groups,))
    return layout


def _noise_stats_layout(body: dict) -> Layout:
    steps, channels = body["steps"], body["channels"]
    measured = body.get("measured", ("runtime", "stepwise"))  # all, before it was said
    per_channel = ["mean", "variance", "residual_mean", "affine_a", "affine_b", "affine_mean"]
    per_step = ["correlation_k", "residual_variance", "affine_variance"]
    if "runtime" in measured:
        of_step = ("variance", "slope", "tensor_gain", "channel_gain", "slope_gain")
        per_channel.append("runtime_mean")
        per_step += [f"runtime_{name}" for name in of_step]
    layout: Layout = {"timesteps": (INT64, (steps,))}
    layout |= dict.fromkeys(per_channel, (FLOAT32, (steps, channels)))
    layout |= dict.fromkeys(per_step, (FLOAT32, (steps,)))
    if "stepwise" in measured:
        terms = (body["sampler_steps"], channels)
        layout |= dict.fromkeys(("stepwise_prediction", "stepwise_latent"), (FLOAT32, terms))
        layout["stepwise_field"] = (FLOAT32, (*terms, *body["grid"]))
    return layout


def _reuse_layout(body: dict) -> Layout:
    steps, branches = len(body["timesteps"]), body["branches"]
    layout: Layout = {
        f"{site}.{name}": (FLOAT32, (steps, branches, channels))
        for site, channels in body["sites"].items()
        for name in ("factor", "slope", "offset")
    }
    if body["channels"]:
        terms = (steps, body["channels"])
        layout |= dict.fromkeys(("stepwise_prediction", "stepwise_latent"), (FLOAT32, terms))
        layout["stepwise_field"] = (FLOAT32, (*terms, *body["grid"]))
    return layout


def _latents_layout(body: dict) -> Layout:
    count, latent = body["count"], tuple(body["latent_shape"])
    return {
        "latents": (FLOAT32, (count, *latent)),
        "seeds": (INT64, (count,)),
        "classes": (INT64, (count,)),
        "predictions": (FLOAT32, (body["traced"], body["steps"], *latent)),
        "prediction_seeds": (INT64, (body["traced"],)),
    }


def _features_layout(body: dict) -> Layout:
    return {name: (FLOAT32, (body["count"], width)) for name, width in body["widths"].items()}


def _partial_layout(body: dict) -> Layout:
    return {
        f"{key}/{name}": (type_, tuple(shape))
        for key, piece in body["pieces"].items()
        for name, (type_, shape) in piece["tensors"].items()
    }


@dataclass(frozen=True)
class _Kind:
    """version: of the grammar; layout: of the tensors that a body announces; command: what makes a
    good file; body: keys that a body has, each with the type of its value."""

    version: int
    layout: Callable[[dict], Layout]
    command: str
    body: dict[str, type]

    def problem(self, body: Any) -> str | None:
        """What is wrong with a body in words, or None."""
        if not isinstance(body, dict):
            return "its description is no object"
        for key, wanted in self.body.items():
            if type(body.get(key)) is not wanted:
                return f"its description has no {key}, or one of another type"
        return None


KINDS: dict[str, _Kind] = {
    "calibration": _Kind(
        3,
        _calibration_layout,
        "qncd calibrate",
        {
            **{"rows": int, "latent_shape": list, "groups": int, "group_bounds": list},
            **{"layers": dict, "attention": dict, "timesteps": list},
        },
    ),
    "smoothing": _Kind(2, _smoothing_layout, "qncd calibrate", {"layers": dict}),
    "quantized": _Kind(
        2,
        _quantized_layout,
        "qncd quantize",
        {
            **{"layers": dict, "attention": dict, "groups": int, "group_bounds": list},
            "cache_time_embeddings": bool,
        },
    ),
    "first_stage": _Kind(
        1,
        _quantized_layout,
        "qncd quantize",
        {
            **{"layers": dict, "attention": dict, "groups": int, "group_bounds": list},
            **{"macs": int, "integer_macs": int},
        },
    ),
    "text_encoders": _Kind(
        1,
        _quantized_layout,
        "qncd quantize",
        {
            **{"layers": dict, "attention": dict, "groups": int, "group_bounds": list},
            **{"bits": int, "float_bytes": int, "prompts": int, "fidelity": dict},
        },
    ),
    "noise_stats": _Kind(
        4,
        _noise_stats_layout,
        "qncd quantize",
        {
            **{"channels": int, "steps": int, "sampler_steps": int, "grid": list},
            **{"sampling": dict, "target": str},
        },
    ),
    "reuse": _Kind(
        1,
        _reuse_layout,
        "qncd quantize",
        {
            **{"timesteps": list, "kept": list, "chains": list, "share": float, "sites": dict},
            **{"branches": int, "correction": str, "channels": int, "grid": list},
            "sampling": dict,
        },
    ),
    "latents": _Kind(
        1,
        _latents_layout,
        "qncd sample",
        {"count": int, "latent_shape": list, "traced": int, "steps": int, "extra_calls": int},
    ),
    "features": _Kind(
        1,
        _features_layout,
        "qncd eval",
        {"network": str, "count": int, "size": list, "seen": dict, "widths": dict},
    ),
    "partial": _Kind(
        1,
        _partial_layout,
        "qncd calibrate or qncd quantize",
        {"made_from": dict, "pieces": dict},
    ),
}
