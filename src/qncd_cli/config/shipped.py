"""The configurations that the package ships, one a model, and the names they go by.

A name may hold widths: fashion_ldm_w4a6 is fashion_ldm at 4-bit weights and 6-bit activations.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..spec import WIDTHS_PATTERN
from . import model_card
from .widths import bits_overrides

_PACKAGE = Path(__file__).resolve().parents[1]
_WIDTHS = re.compile(f"_({WIDTHS_PATTERN})(?=_|$)")
_USUAL = ("w8a8", "w4a8", "w4a6", "w4a4")
"""Widths of the names that a misspelt one is compared with."""
_SHOWN = 80
"""Characters of a user's word in an error."""


@dataclass(frozen=True)
class Found:
    """A configuration file. overrides: the widths that its name says and the file does not."""

    path: Path
    overrides: tuple[str, ...] = ()


def shipped_configs() -> dict[str, Path]:
    """Configurations that the package ships, by name without the ending."""
    for folder in (_PACKAGE / "configs", _PACKAGE.parent.parent / "configs"):
        if folder.is_dir():
            return {p.stem: p for p in sorted(folder.glob("*.yaml"))}
    return {}


def split_widths(stem: str) -> tuple[str, str | None]:
    """A name without its widths, and these: ldm4_w4a8_paper -> ldm4_paper, w4a8."""
    found = _WIDTHS.search(stem)
    return (_WIDTHS.sub("", stem), found[1]) if found else (stem, None)


def find_config(name: str) -> Found:
    """A path, or the name of a shipped configuration with or without .yaml. Raises ConfigError."""
    if os.path.isfile(name) and not model_card.is_model(name):
        return Found(Path(name))
    found = find_shipped(name)
    if found is None:
        raise _no_config(name)
    return found


def find_shipped(name: str) -> Found | None:
    """A shipped configuration by name, with or without widths and .yaml."""
    stem, shipped = _stem(name), shipped_configs()
    if Path(name).name != name:
        return None
    base, bits = split_widths(stem)
    if base not in shipped or bits is None:
        return Found(shipped[stem]) if stem in shipped else None
    try:
        return Found(shipped[base], bits_overrides(bits))
    except ConfigError:  # a misspelt name, such as w4a88
        return None


def _stem(name: str) -> str:
    return Path(name).name.removesuffix(".yaml").removesuffix(".yml")


def _no_config(name: str) -> ConfigError:
    if model_card.is_model(name):
        hint = f"qncd run {name} --bits w4a8, or first qncd init {name} > my.yaml"
        return ConfigError(f"{name} is a model, not a configuration", hint)
    if os.path.isdir(name):
        run = os.path.join(name, "config.yaml")
        hint = (
            f"--config {run}" if os.path.isfile(run) else "a model's folder has a model_index.json"
        )
        return ConfigError(f"{name} is a folder, not a configuration", hint)
    known = [n for shipped in shipped_configs() for n in (shipped, *_with_widths(shipped))]
    close = difflib.get_close_matches(_stem(name), known, n=1)
    hint = "qncd models lists those that are shipped; qncd init MODEL writes one for a model"
    return ConfigError(
        f"no configuration {shortened(name)}",
        f"did you mean {close[0]}.yaml?" if close else hint,
    )


def _with_widths(name: str) -> list[str]:
    base, paper, _ = name.partition("_paper")
    return [f"{base}_{bits}{paper}" for bits in _USUAL]


def shortened(text: str) -> str:
    """A word of the user's for an error, which can be a whole prompt where a path is expected."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
