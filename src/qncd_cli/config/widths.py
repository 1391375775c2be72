"""What --bits says: widths of weights and activations like w4a8, or fp."""

from __future__ import annotations

import re

from ..errors import ConfigError
from ..spec import FLOAT_BITS, Widths

FULL_PRECISION = "fp"
WEIGHT_ONLY = re.compile(r"w([2-8])a16")
"""Weights alone, as everywhere: inputs and attention stay in the model's floating point."""


def parse_widths(text: str) -> Widths | None:
    """w4a8 -> (4, 8), fp -> None. Raises ConfigError."""
    if text == FULL_PRECISION:
        return None
    try:
        return Widths.parse(text)
    except ValueError as error:
        if match := WEIGHT_ONLY.fullmatch(text.lower()):
            raise ConfigError(
                f"--bits {text}: weights alone are quantized by more than widths: attention stays "
                f"in floating point too",
                f"in a table: --bits w{match[1]}a{FLOAT_BITS} with --set "
                f"quantization.attention.bits={FLOAT_BITS} --set "
                f"quantization.attention.probabilities_bits={FLOAT_BITS}",
            ) from error
        raise ConfigError(
            f"--bits {text}: expected widths like w4a8, or {FULL_PRECISION}",
            f"2 to 8 bits, or {FLOAT_BITS} for floating point",
        ) from error


def bits_overrides(text: str) -> tuple[str, ...]:
    """Widths as overrides: w4a8 -> quantization.weights.bits=4, ... Raises ConfigError.

    w4a16 leaves every input in floating point; integers of two bytes are set by their key.
    """
    if match := WEIGHT_ONLY.fullmatch(text.lower()):
        inputs = ("activations.bits", "attention.bits", "attention.probabilities_bits")
        return (
            f"quantization.weights.bits={match[1]}",
            *(f"quantization.{key}={FLOAT_BITS}" for key in inputs),
        )
    found = parse_widths(text)
    if found is None:
        raise ConfigError(f"--bits {text}: quantizes nothing", "widths like w4a8")
    return (
        f"quantization.weights.bits={found.weights}",
        f"quantization.activations.bits={found.activations}",
    )
