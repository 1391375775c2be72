"""Widths of weights and activations as they are written: w4a8."""

from __future__ import annotations

import re

from ..errors import ConfigError
from ..spec import FLOAT_BITS

FULL_PRECISION = "fp"
Widths = tuple[int, int]


def parse_widths(text: str) -> Widths | None:
    """w4a8 -> (4, 8), fp -> None. Raises ConfigError."""
    if text == FULL_PRECISION:
        return None
    match = re.fullmatch(r"w(\d{1,2})a(\d{1,2})", text.lower())
    found = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(2 <= bits <= 8 or bits == FLOAT_BITS for bits in found):
        raise ConfigError(
            f"--bits {text}: expected widths like w4a8, or {FULL_PRECISION}",
            f"2 to 8 bits, or {FLOAT_BITS} for floating point",
        )
    return found


def bits_overrides(text: str) -> tuple[str, ...]:
    """Widths as overrides: w4a8 -> quantization.weights.bits=4, ... Raises ConfigError."""
    found = parse_widths(text)
    if found is None:
        raise ConfigError(f"--bits {text}: quantizes nothing", "widths like w4a8")
    weights, activations = found
    return (f"quantization.weights.bits={weights}", f"quantization.activations.bits={activations}")
