"""Coverage: what runs at which precision, and what it costs."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import nn

from ..config.presets import excluded_by
from ..config.schema import Config
from ..models.loading import DiffusionModel
from ..models.topology import LayerCost, float_attention, time_layers, weight_layers
from ..quant.packing import narrowed
from ..runtime.denoiser import denoiser_costs
from ..spec import FLOAT_BITS, MAX_ACTIVATION_BITS, WIDE_WEIGHT_BITS, Widths
from ..store.artifacts import Artifact, packed_width
from ..store.layer_entry import layer_entries
from .attention import product_widths


def coverage(config: Config, model: DiffusionModel, quantized: Artifact) -> dict[str, Any]:
    """What runs at which precision, and why the rest does not run in integers."""
    costs = denoiser_costs(config, model)
    return coverage_of(config, model.denoiser, costs, quantized)


def coverage_of(
    config: Config,
    denoiser: nn.Module,
    costs: list[LayerCost],
    quantized: Artifact,
    element_bytes: int | None = None,
) -> dict[str, Any]:
    """Coverage of a denoiser whose costs are known; of the artifact only the body is read.

    element_bytes: of one number of what stays unquantized; None looks at the numbers.
    """
    entries = layer_entries(quantized.body)
    cached = config.quantization.cache_time_embeddings
    timed = time_layers(denoiser)
    known = {name: entry.widths for name, entry in entries.items()} | product_widths(quantized)
    reasons = float_attention(denoiser)
    rows = [
        _coverage_row(
            c, known.get(c.name), c.name in timed, cached, reasons.get(c.name.rpartition(".")[0])
        )
        for c in costs
    ] + _unreached(denoiser, costs)
    preset, strict = config.quantization.preset, config.quantization.strict
    for row in rows:
        if row["why_not_integer"] == "configured" and excluded_by(preset, strict, row["name"]):
            row["why_not_integer"] = f"left in float by preset {preset}"
    total = sum(cost.macs for cost in costs)
    integer = sum(r["macs"] for r in rows if r["integer"])
    per_precision: dict[str, float] = {}
    for row in rows:
        key = Widths(row["weight_bits"], row["activation_bits"]).label
        per_precision[key] = per_precision.get(key, 0.0) + row["macs"] / total
    code_bytes, code_bits, codes = 0, 0, 0
    for entry in entries.values():
        if entry.weight_bits == FLOAT_BITS:
            code_bytes += 4 * entry.weights
            continue
        code_bytes += entry.weight_shape[0] * packed_width(entry.in_features, entry.weight_bits)
        codes += entry.weights
        code_bits += entry.weights * entry.weight_bits
    return {
        "layers": rows,
        "integer_macs_share": integer / total,
        "macs_share_by_precision": per_precision,
        "macs": total,
        "bit_operations": sum(r["macs"] * r["weight_bits"] * r["activation_bits"] for r in rows),
        "mean_weight_bits": sum(r["macs"] * r["weight_bits"] for r in rows) / total,
        "mean_input_bits": sum(r["macs"] * r["activation_bits"] for r in rows) / total,
        "rest_bytes": rest_bytes(denoiser, entries, element_bytes),
        "weight_code_bytes": code_bytes,
        "average_weight_bits": code_bits / codes if codes else None,
        "float_denoiser_bytes": 4 * sum(p.numel() for p in denoiser.parameters()),
    }


def _unreached(denoiser: nn.Module, costs: list[LayerCost]) -> list[dict[str, Any]]:
    """Rows of layers of optional inputs that a pipeline of this kind does not give."""
    called = {cost.name for cost in costs}
    rows = []
    for name, layer in weight_layers(denoiser).items():
        if name not in called:
            cost = LayerCost(name, "conv" if isinstance(layer, nn.Conv2d) else "linear", 0)
            row = _coverage_row(cost, None, False, False, None)
            rows.append({**row, "why_not_integer": "no input reaches it: left in float"})
    return rows


def rest_bytes(
    denoiser: nn.Module, entries: Container[str], element_bytes: int | None = None
) -> int:
    """What the denoiser needs beside the artifact: norms, embeddings and layers left in float.

    In 16 bits where these hold a tensor exactly, as `qncd export` stores it. entries: names of the
    artifact's layers; element_bytes: as in coverage_of.
    """
    rest = (t for n, t in denoiser.state_dict().items() if n.rpartition(".")[0] not in entries)
    if element_bytes is not None:
        return element_bytes * sum(tensor.numel() for tensor in rest)
    return sum(narrowed(tensor).nbytes for tensor in rest)


def _kernel(cost: LayerCost, widths: Widths) -> str:
    """What computes integers where the backend int8 can be used."""
    if cost.kind == "matmul":
        return "int8, or float where the product is small"
    passes = (1 + (widths.weights > 8)) * (1 + (widths.activations > 8))
    return "int8" if passes == 1 else f"int8, {passes} passes"


def _coverage_row(
    cost: LayerCost, known: Widths | None, timed: bool, cached: bool, reason: str | None
) -> dict[str, Any]:
    widths = known or Widths(FLOAT_BITS, FLOAT_BITS)
    widest = 8 if cost.kind == "matmul" else MAX_ACTIVATION_BITS  # two passes: layers only
    integer = widths.weights <= WIDE_WEIGHT_BITS and widths.activations <= widest
    why = ""
    if cost.kind == "matmul" and reason:
        why = reason
    elif timed and known is None:
        why = "depends on the timestep alone: full precision"
        why += ", evaluated once per sampler step" if cached else ""
    elif widths.weights < FLOAT_BITS == widths.activations and cost.kind != "matmul":
        why = "weights alone are quantized"
    elif not integer:
        why = "configured"
    return {
        "name": cost.name,
        "kind": cost.kind,
        "macs": cost.macs,
        "weight_bits": widths.weights,
        "activation_bits": widths.activations,
        "integer": integer,
        "kernel": _kernel(cost, widths) if integer else "float",
        "why_not_integer": why,
    }
