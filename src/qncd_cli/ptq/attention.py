"""Ranges of attention's operands, and the bits of its products."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..config.schema import Config
from ..models.topology import AttentionSite
from ..quant.affine import choose_qparams
from ..quant.observers import RangeObserver, choose_range
from ..spec import ATTENTION_OPERANDS, FLOAT_BITS, Widths, activation_spec
from ..store.artifacts import Artifact, tensors_below
from ..store.layer_entry import AttentionEntry, attention_entries
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
) -> tuple[dict[str, Tensor], dict[str, AttentionEntry]]:
    """The quantized artifact's tensors and entries of every attention module.

    Both are empty where q, k, v and the probabilities all stay in floating point.
    """
    entries = quantized_sites(config, calibration.body["attention"])
    percentile = config.quantization.activations.percentile
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if entry.bits == FLOAT_BITS:
            continue
        spec = activation_spec(entry.bits)
        for operand in ATTENTION_OPERANDS:
            prefix = f"{name}.{operand}_"
            state = tensors_below(prefix, calibration.tensors)
            low, high = choose_range(state, entry.observer, spec, percentile)
            qparams = choose_qparams(low, high, spec)
            tensors[f"{prefix}scale"], tensors[f"{prefix}zero_point"] = qparams
    return tensors, entries


def quantized_sites(config: Config, sites: Iterable[str]) -> dict[str, AttentionEntry]:
    """Entries of the attention modules, of these, whose products take quantized operands.

    None where both bits say floating point; else all but those whose name an override leaves in
    floating point (activations of 32 bits).
    """
    attention = config.quantization.attention
    if attention.bits == attention.probabilities_bits == FLOAT_BITS:
        return {}
    observer = range_observer(config.quantization.activations.observer)
    entry = AttentionEntry(attention.bits, attention.probabilities_bits, observer)
    overrides = ((name, override_of(name, config.quantization.overrides)) for name in sites)
    names = [n for n, found in overrides if not found or found.activations.bits != FLOAT_BITS]
    return dict.fromkeys(names, entry)


def product_widths(artifact: Artifact) -> dict[str, Widths]:
    """Bits of both products by the names of their costs (topology.count_macs).

    Those of weights: of the key or the value; of activations: of the query or the probabilities.
    """
    found = {}
    for name, entry in attention_entries(artifact.body).items():
        found[f"{name}.query_key"] = Widths(entry.bits, entry.bits)
        found[f"{name}.probabilities_value"] = Widths(entry.bits, entry.probabilities_bits)
    return found
