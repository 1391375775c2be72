"""What --bits says: widths of weights and activations like w4a8, or fp."""

from __future__ import annotations

import re

from ..errors import ConfigError
from ..spec import FLOAT_BITS, Widths

FULL_PRECISION = "fp"
WEIGHT_ONLY = re.compile(r"w([2-8])a16")
"""What elsewhere means quantized weights and inputs in 16-bit floating point."""


def parse_widths(text: str) -> Widths | None:
    """w4a8 -> (4, 8), fp -> None. Raises ConfigError."""
    if text == FULL_PRECISION:
        return None
    try:
        return Widths.parse(text)
    except ValueError as error:
        if match := WEIGHT_ONLY.fullmatch(text.lower()):
            raise ConfigError(
                f"--bits {text}: inputs of 16 bits are integers of two bytes here, set by "
                f"quantization.activations.bits",
                f"for inputs of layers in floating point: --bits w{match[1]}a{FLOAT_BITS}; "
                "attention's operands have bits of their own, quantization.attention",
            ) from error
        raise ConfigError(
            f"--bits {text}: expected widths like w4a8, or {FULL_PRECISION}",
            f"2 to 8 bits, or {FLOAT_BITS} for floating point",
        ) from error


def bits_overrides(text: str) -> tuple[str, ...]:
    """Widths as overrides: w4a8 -> quantization.weights.bits=4, ... Raises ConfigError."""
    found = parse_widths(text)
    if found is None:
        raise ConfigError(f"--bits {text}: quantizes nothing", "widths like w4a8")
    return (
        f"quantization.weights.bits={found.weights}",
        f"quantization.activations.bits={found.activations}",
    )
