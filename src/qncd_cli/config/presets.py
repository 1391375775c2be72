"""Presets: what a published baseline sets in the configuration.

A preset fills keys of the configuration tree; it is plain data. What its paper leaves unquantized
stands apart (`exclusions`, patterns of layer names as in quantization.overrides), so that
`quantization.strict` can leave it out and quantize everything.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Tree = dict[str, Any]
KEEP_FLOAT: Tree = {"weights": {"bits": 32}, "activations": {"bits": 32}}


@dataclass(frozen=True)
class Preset:
    """settings: the keys that the preset fills; exclusions: layer pattern -> override."""

    description: str
    settings: Tree
    exclusions: Tree = field(default_factory=dict)
    exclusions_note: str = ""


def merged(low: Tree, high: Tree) -> Tree:
    """Both trees in one; where both hold a value, that of `high`. Neither is changed."""
    result = copy.deepcopy(low)
    for key, value in high.items():
        below = result.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            result[key] = merged(below, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


_MINMAX: Tree = {
    "quantization": {
        "weights": {"rounding": "nearest"},
        "activations": {"observer": "minmax", "timestep_groups": 1},
        "attention": {"bits": 8, "probabilities_bits": 8},
        "first_last_bits": 8,
        "first_last_activation_bits": 8,
        "first_last_observer": "minmax",
        "bias_correction": False,
        "sensitive": {"weight_bits": 0.0, "activation_bits": 0.0},
        "split_skip_connections": False,
    },
    "correction": {"intra": "none", "inter": {"method": "none"}},
}
_QDIFFUSION = merged(
    _MINMAX,
    {
        "quantization": {
            "weights": {"rounding": "gptq"},
            "activations": {"observer": "moving_average"},
            "split_skip_connections": True,
        },
    },
)
_BEST: Tree = {
    "quantization": {
        "weights": {"rounding": "gptq"},
        "activations": {"observer": "output", "timestep_groups": 20},
        "attention": {"bits": 8, "probabilities_bits": 8},
        "first_last_bits": 8,
        "first_last_activation_bits": 16,
        "first_last_observer": "minmax",
        "bias_correction": False,
        "sensitive": {"weight_bits": 0.6, "activation_bits": 1.0},
        "split_skip_connections": False,
    },
    "correction": {"intra": "none", "inter": {"method": "none"}},
}
_BEST_LABEL: Tree = merged(
    _BEST,
    {
        "quantization": {
            "first_last_activation_bits": 8,
            "first_margin": 1.3,
            "sensitive": {"weight_bits": 0.0, "activation_bits": 0.0},
        }
    },
)
_INTRA: Tree = {"correction": {"intra": "embedding"}}
PUBLISHED_INTER: Tree = {
    "correction": {
        "inter": {
            "method": "runtime",
            "target": "injected",
            "granularity": "batch",
            "interval": 10,
            "first": 6,
            "repeat": True,
            "baseline": "none",
        }
    }
}
_TRANSFORMER_BLOCKS: Tree = {"*attentions*transformer_blocks*": KEEP_FLOAT}
_TRANSFORMER_NOTE = (
    "the transformer blocks of a U-Net stay float, weights and attention included, as in QNCD's "
    "published code"
)

PRESETS: dict[str, Preset] = {
    "minmax": Preset("nearest rounding, min-max ranges, no correction: the floor", _MINMAX),
    "qdiffusion": Preset(
        "rounding by the layer's output error, ranges by the mean extremes of small batches, no "
        "correction (after arXiv 2302.04304)",
        _QDIFFUSION,
    ),
    "ptqd": Preset(
        "qdiffusion, correlated and residual quantization noise corrected (arXiv 2305.10657)",
        merged(_QDIFFUSION, {"correction": {"inter": {"method": "ptqd"}}}),
    ),
    "tdq": Preset(
        "qdiffusion, activation ranges by groups of timesteps: 5, or one a step where the sampler "
        "has fewer steps (after arXiv 2306.02316)",
        merged(_QDIFFUSION, {"quantization": {"activations": {"timestep_groups": 5}}}),
    ),
    "qncd-intra": Preset(
        "qdiffusion with embedding-derived smoothing (arXiv 2403.19140, intra noise)",
        merged(_QDIFFUSION, _INTRA),
        _TRANSFORMER_BLOCKS,
        _TRANSFORMER_NOTE,
    ),
    "qncd-inter": Preset(
        "qdiffusion with the published run-time estimate, one number for all samples that are "
        "drawn together (arXiv 2403.19140, inter noise)",
        merged(_QDIFFUSION, PUBLISHED_INTER),
        _TRANSFORMER_BLOCKS,
        _TRANSFORMER_NOTE,
    ),
    "qncd": Preset(
        "qncd-intra and qncd-inter together (arXiv 2403.19140)",
        merged(merged(_QDIFFUSION, _INTRA), PUBLISHED_INTER),
        _TRANSFORMER_BLOCKS,
        _TRANSFORMER_NOTE,
    ),
    "best": Preset(
        "what measured best (docs/results.md): ranges by the layer's output at every step, "
        "extra bits for the few layers that matter most",
        _BEST,
    ),
    "best-label": Preset(
        "best without its extra bits: the widths that the label names, 8 bits in the outer "
        "layers' weights",
        _BEST_LABEL,
    ),
}


# ------------------------------------------------------------------ trees


def filled(tree: Tree, steps: int) -> Tree:
    """The tree with what its quantization.preset sets and it does not; strict: no exclusions.

    steps: of the sampler, the most groups of timesteps there can be. The preset's exclusions come
    before the tree's own overrides, of which the last that matches wins. A tree without a preset,
    or with an unknown one, comes back as it is: validation is not done here.
    """
    section = tree.get("quantization")
    if not isinstance(section, dict) or not isinstance(section.get("preset"), str):
        return tree
    preset = PRESETS.get(section["preset"])
    if preset is None:
        return tree
    settings = for_steps(preset.settings, steps)
    if preset.exclusions and not section.get("strict", False):
        settings = merged(settings, {"quantization": {"overrides": preset.exclusions}})
    return merged(settings, tree)


def for_steps(settings: Tree, steps: int) -> Tree:
    """A preset's settings for a sampler of so many steps."""
    settings = copy.deepcopy(settings)
    activations = settings.get("quantization", {}).get("activations", {})
    if "timestep_groups" in activations:
        activations["timestep_groups"] = min(activations["timestep_groups"], steps)
    inter = settings.get("correction", {}).get("inter", {})
    if "first" in inter:  # published for 50 steps; shorter samplers get an estimate halfway
        inter["first"] = min(inter["first"], steps // 2)
    return settings


def without_settings(tree: Tree) -> Tree:
    """The tree without the keys that any preset sets: room for another preset."""
    result = copy.deepcopy(tree)
    for preset in PRESETS.values():
        for path in _leaves(preset.settings):
            _remove(result, path)
    return without_exclusions(result)


def without_exclusions(tree: Tree) -> Tree:
    """The tree without the overrides that its own preset brought into it."""
    section = tree.get("quantization")
    if not isinstance(section, dict) or not isinstance(section.get("overrides"), dict):
        return tree
    preset = PRESETS.get(str(section.get("preset")))
    if preset is None:
        return tree
    kept = {
        pattern: override
        for pattern, override in section["overrides"].items()
        if _said(override) != preset.exclusions.get(pattern)
    }
    return {**tree, "quantization": {**section, "overrides": kept}}


def excluded_by(preset: str | None, strict: bool, layer: str) -> bool:
    """Whether the preset leaves the layer in floating point."""
    if preset is None or strict:
        return False
    return any(fnmatch.fnmatchcase(layer, p) for p in PRESETS[preset].exclusions)


def _leaves(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key)


def _remove(tree: Tree, path: tuple[str, ...]) -> None:
    *parents, last = path
    node: Any = tree
    for key in parents:
        node = node.get(key)
        if not isinstance(node, dict):
            return
    node.pop(last, None)


def _said(value: Any) -> Any:
    """A tree without its nulls and its empty sections, which a resolved configuration spells out"""
    if not isinstance(value, dict):
        return value
    said = {key: _said(item) for key, item in value.items() if item is not None}
    return {key: item for key, item in said.items() if item != {}}
