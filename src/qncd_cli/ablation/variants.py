"""Variants: the configuration of every row of the ablation's table.

A row is a variant of one configuration at one pair of widths. A variant is a preset, or one of
CORRECTIONS: the configuration's own settings with its two corrections switched on and off. Either
takes suffixes `+INGREDIENT`, each of which changes one thing.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config.loading import load_config, parse_config
from ..config.presets import PRESETS, PUBLISHED_INTER, Tree, for_steps, merged
from ..config.schema import Config
from ..config.widths import parse_widths
from ..errors import ConfigError
from ..spec import FLOAT_BITS, Widths

CORRECTIONS = {
    "none": (False, False),
    "intra": (True, False),
    "inter": (False, True),
    "both": (True, True),
}
"""Name: whether the intra and the inter correction of the configuration stay."""
_KNOWN = [*PRESETS, *CORRECTIONS]
_CHOICES: dict[str, tuple[str, ...]] = {
    "correction.inter.method": ("none", "runtime", "ptqd", "affine", "stepwise"),
    "correction.intra": ("embedding", "smoothquant", "auto"),
    "quantization.weights.rounding": ("nearest", "gptq", "adaround", "brecq"),
}


def _setting(path: str, value: Any) -> Tree:
    """A tree of one key."""
    tree = value
    for key in reversed(path.split(".")):
        tree = {key: tree}
    return tree


INGREDIENTS: dict[str, Tree] = {
    **{value: _setting(path, value) for path, values in _CHOICES.items() for value in values},
    "published": PUBLISHED_INTER,
    "flat": {"correction": {"inter": {"field": 1}}},
    "bias": {"quantization": {"bias_correction": True}},
    "weighed": {"quantization": {"step_weights": 1.0}},
    "rotated": {"quantization": {"rotation": 16}},
}
"""Suffix: the keys that it sets, whatever the row's preset and --set say of them."""
INTER = ("runtime", "ptqd", "affine", "stepwise+flat", "stepwise")
"""Ingredients of the inter corrections that are more than the published one."""
GROUPS = {
    "corrections": (
        *("qdiffusion", "qncd-intra", "qncd-inter", "qncd"),
        *(f"qdiffusion+{name}" for name in INTER),
        *("best", "best+embedding", "best+published", "best+embedding+published"),
        *(f"best+{name}" for name in INTER),
    ),
}
"""A word for several rows: no correction, intra, inter, both as published; inter estimated well;
the offline ones; stepwise with an offset per channel alone, and one that depends on the place."""


@dataclass(frozen=True)
class Variant:
    """One row: its name as asked for, its widths as asked for, its configuration."""

    name: str
    widths: str
    config: Config

    @property
    def label(self) -> str:
        return f"{self.name}_{self.widths}"


def named(names: Sequence[str]) -> list[str]:
    """The names with those of GROUPS written out."""
    return [row for name in names for row in GROUPS.get(name, (name,))]


def variants(
    config_name: str,
    names: Sequence[str],
    widths: Sequence[str],
    overrides: Sequence[str],
    *,
    published: bool = False,
) -> list[Variant]:
    """Every name at every pair of widths, each once, in the order of the widths, then the names.

    names: presets and CORRECTIONS, with or without +INGREDIENT; widths: w4a8, ..., or fp; none: the
    configuration's own. overrides hold for every row; of a preset's keys too, they win.
    published: keep in floating point what each preset's paper does. Raises ConfigError.
    """
    if not names:
        raise ConfigError("--presets: no row is named", f"known: {', '.join(_KNOWN)}")
    config = load_config(config_name, overrides)
    chosen = list(dict.fromkeys(widths)) or [str(config.quantization.widths)]
    parsed = {text: parse_widths(text) for text in chosen}
    strict = f"quantization.strict={'false' if published else 'true'}"
    rows = []
    for text in chosen:
        for name in dict.fromkeys(names):
            tree = _tree(config_name, name, [strict, *overrides])
            rows.append(Variant(name, text, _at_widths(tree, parsed[text], f"{name} at {text}")))
    return rows


def _tree(config_name: str, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of a variant, before its widths. Raises ConfigError."""
    base, *ingredients = name.split("+")
    for ingredient in ingredients:
        if ingredient not in INGREDIENTS:
            known = ", ".join(INGREDIENTS)
            raise ConfigError(f"--presets {name}: unknown +{ingredient}", f"known: {known}")
    if base in PRESETS:
        tree = load_config(config_name, [f"quantization.preset={base}", *overrides]).to_dict()
    elif base in CORRECTIONS:
        tree = load_config(config_name, overrides).to_dict()
        intra, inter = CORRECTIONS[base]
        if not intra:
            tree["correction"]["intra"] = "none"
        if not inter:
            tree["correction"]["inter"]["method"] = "none"
    else:
        close = difflib.get_close_matches(base, _KNOWN, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(_KNOWN)}"
        raise ConfigError(f"--presets {name}: unknown preset {base}", hint)
    for ingredient in ingredients:
        tree = merged(tree, for_steps(INGREDIENTS[ingredient], tree["sampling"]["steps"]))
    return tree


def _at_widths(tree: dict[str, Any], widths: Widths | None, where: str) -> Config:
    """fp leaves the model as it is, whatever else the variant says: only its inter correction
    remains."""
    quantization = tree["quantization"]
    weights, activations = quantization["weights"], quantization["activations"]
    if widths is not None:
        weights["bits"], activations["bits"] = widths
        return parse_config(tree, where)
    weights |= {"bits": FLOAT_BITS, "rounding": "nearest"}
    activations |= {"bits": FLOAT_BITS, "observer": "minmax", "timestep_groups": 1}
    quantization |= {"first_last_bits": FLOAT_BITS, "overrides": {}}
    quantization |= {"attention": {"bits": FLOAT_BITS, "probabilities_bits": FLOAT_BITS}}
    quantization |= {"split_skip_connections": False, "bias_correction": False}
    tree["correction"]["intra"] = "none"
    return parse_config(tree, where)


def check_variants(variants: Sequence[Variant]) -> None:
    """Raise ConfigError for what a table does not compare."""
    if (reuse := variants[0].config.sampling.reuse) is not None:
        raise ConfigError(
            f"sampling.reuse {reuse:g}: ablate draws its rows without reuse across steps",
            "add --set sampling.reuse=null",
        )
    if (bits := variants[0].config.first_stage.bits) is not None:
        raise ConfigError(
            f"first_stage.bits {bits}: ablate decodes all rows alike, in floating point",
            "add --set first_stage.bits=null",
        )
    if (encoders := variants[0].config.text_encoders.bits) is not None:
        raise ConfigError(
            f"text_encoders.bits {encoders}: ablate encodes all rows alike, in floating point",
            "add --set text_encoders.bits=null",
        )


def statistics_of(variants: Sequence[Variant]) -> frozenset[str]:
    """Statistics of noise that corrections of any variant need (`InterConfig.statistics`)."""
    return frozenset().union(*(v.config.correction.inter.statistics for v in variants))
