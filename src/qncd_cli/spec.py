"""The vocabulary of quantization, without torch: what a quantizer is, not what it does.

Notation (used everywhere): x ~ (q - zero_point) * scale, q integer in [qmin, qmax].
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

FLOAT_BITS = 32
"""`bits: 32` leaves a tensor in floating point."""
ATTENTION_OPERANDS = ("query", "key", "value")

MAX_ACTIVATION_BITS = 16
"""Above 8 bits a layer's input is two bytes, and the layer two passes of an 8-bit kernel."""
WIDE_WEIGHT_BITS = 15
"""Weights of two bytes: 8 signed high bits and 7 low ones, each an int8 weight of its own pass."""

WIDTHS_PATTERN = r"w(\d{1,2})a(\d{1,2})"


class Widths(NamedTuple):
    """Bits of weights and of activations; either may be FLOAT_BITS.

    Written w4a8 in options and names of files, W4A8 where people read it.
    """

    weights: int
    activations: int

    @classmethod
    def parse(cls, text: str) -> Widths:
        """w4a8 -> (4, 8), in capitals too. Raises ValueError."""
        match = re.fullmatch(WIDTHS_PATTERN, text.lower())
        found = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not all(2 <= bits <= 8 or bits == FLOAT_BITS for bits in found):
            raise ValueError(
                f"{text}: widths are written like w4a8, of 2 to 8 or {FLOAT_BITS} bits"
            )
        return found

    def __str__(self) -> str:
        return f"w{self.weights}a{self.activations}"

    @property
    def label(self) -> str:
        """W4A8"""
        return str(self).upper()

    def described(self, mean: tuple[float, float] | None) -> str:
        """W4A8 (6.0 / 9.0), in brackets the mean bits over multiplications where it is known."""
        return self.label if mean is None else f"{self.label} ({mean[0]:.1f} / {mean[1]:.1f})"


class Compile(Enum):
    """Whether a denoiser is run as a compiled graph."""

    YES = "yes"
    NO = "no"
    WHERE_IT_PAYS = "where it pays"

    @classmethod
    def of(cls, wish: bool | None) -> Compile:
        """A wish that may have been left open."""
        return cls.WHERE_IT_PAYS if wish is None else cls.YES if wish else cls.NO

    def going_on(self, compiled: bool) -> Compile:
        """For a sample set that began compiled, or not: it goes on so, unless told otherwise."""
        return Compile.of(compiled) if self is Compile.WHERE_IT_PAYS else self


@dataclass(frozen=True)
class QSpec:
    """A uniform affine quantizer.

    bits: width of the codes. symmetric: zero_point is 0 and codes are signed, in
    [-(2^(b-1) - 1), 2^(b-1) - 1]; else codes are unsigned, in [0, 2^b - 1], with a zero_point.
    axis: None for one scale per tensor, 0 for one scale per output channel.

    Weights of more than 7 bits are symmetric: (q - zero_point) has to fit int8 (two of them, at
    WIDE_WEIGHT_BITS), so that 8-bit integer kernels compute the configuration exactly. Raises
    ValueError for other bits than 2 to 16.
    """

    bits: int
    symmetric: bool = False
    axis: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"bits must be in 2..16, got {self.bits}")

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1) - 1) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1


def weight_spec(bits: int) -> QSpec:
    """Per output channel; asymmetric below 8 bits, where q - zero_point still fits int8."""
    if bits > 8 and bits != WIDE_WEIGHT_BITS:
        raise ValueError(f"weights take 2 to 8 or {WIDE_WEIGHT_BITS} bits, got {bits}")
    return QSpec(bits=bits, symmetric=bits >= 8, axis=0)


def activation_spec(bits: int) -> QSpec:
    """Per tensor (and per timestep group), unsigned codes with a zero-point."""
    return QSpec(bits=bits, symmetric=False, axis=None)
