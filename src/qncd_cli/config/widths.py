"""What --bits says: widths of weights and activations like w4a8, or fp."""

from __future__ import annotations

from ..errors import ConfigError
from ..spec import FLOAT_BITS, Widths

FULL_PRECISION = "fp"


def parse_widths(text: str) -> Widths | None:
    """w4a8 -> (4, 8), fp -> None. Raises ConfigError."""
    if text == FULL_PRECISION:
        return None
    try:
        return Widths.parse(text)
    except ValueError as error:
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
