"""Ranges of attention's operands, and the bits of its products."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..config.schema import Config
from ..models.topology import AttentionSite
from ..quant.affine import choose_qparams
from ..quant.observers import RangeObserver, choose_range
from ..spec import ATTENTION_OPERANDS, FLOAT_BITS, activation_spec
from ..store.artifacts import Artifact, tensors_below
from .layer_plan import override_of, range_observer


def operand_observers(sites: list[AttentionSite], groups: int) -> dict[str, RangeObserver]:
    """One observer of q, k and v each, by `<module>.query`, `.key` and `.value`."""
    return {
        f"{site.name}.{operand}": RangeObserver(site.channels, -1, groups)
        for site in sites
        for operand in ATTENTION_OPERANDS
    }


def quantize_attention(
    config: Config, calibration: Artifact
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The quantized artifact's tensors and entries of every attention module.

    Both are empty where q, k, v and the probabilities all stay in floating point.
    """
    attention, activations = config.quantization.attention, config.quantization.activations
    names = quantized_sites(config, calibration.body["attention"])
    observer = range_observer(activations.observer)
    tensors: dict[str, Tensor] = {}
    for name in names if attention.bits != FLOAT_BITS else ():
        spec = activation_spec(attention.bits)
        for operand in ATTENTION_OPERANDS:
            prefix = f"{name}.{operand}_"
            state = tensors_below(prefix, calibration.tensors)
            low, high = choose_range(state, observer, spec, activations.percentile)
            qparams = choose_qparams(low, high, spec)
            tensors[f"{prefix}scale"], tensors[f"{prefix}zero_point"] = qparams
    entry = {
        "bits": attention.bits,
        "probabilities_bits": attention.probabilities_bits,
        "observer": observer,
    }
    return tensors, {name: dict(entry) for name in names}


def quantized_sites(config: Config, sites: Iterable[str]) -> list[str]:
    """The attention modules, of these, whose products take quantized operands.

    None where both bits say floating point; else all but those whose name an override leaves in
    floating point (activations of 32 bits).
    """
    attention = config.quantization.attention
    if attention.bits == attention.probabilities_bits == FLOAT_BITS:
        return []
    overrides = ((name, override_of(name, config.quantization.overrides)) for name in sites)
    return [n for n, found in overrides if not found or found.activations.bits != FLOAT_BITS]


def product_entries(artifact: Artifact) -> dict[str, dict[str, int]]:
    """Bits of both products by the names of their costs (topology.count_macs).

    weight_bits: of the key or the value; activation_bits: of the query or the probabilities.
    """
    found = {}
    for name, entry in artifact.body["attention"].items():
        bits, p_bits = entry["bits"], entry["probabilities_bits"]
        found[f"{name}.query_key"] = {"weight_bits": bits, "activation_bits": bits}
        found[f"{name}.probabilities_value"] = {"weight_bits": bits, "activation_bits": p_bits}
    return found
