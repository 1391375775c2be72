"""What the sections of the configuration share: strictness, widths, names of observers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..spec import FLOAT_BITS, WIDE_WEIGHT_BITS

MAX_STEPS = 1000
Side = Annotated[int, Field(ge=16)]
"""Height or width of an image, in pixels."""
Bits = Annotated[int, Field(ge=2, le=FLOAT_BITS)]
Observer = Literal["minmax", "moving_average", "percentile", "mse", "output"]
"""How a range is chosen; output: by the error of the layer's output."""


class Section(BaseModel):
    """A frozen mapping that takes no key and no type beside its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def check_bits(bits: int, what: str, most: int = 8) -> None:
    """Raises ValueError for widths between the widest codes and floating point."""
    if most < bits < FLOAT_BITS:
        raise ValueError(f"{what} takes 2 to {most} bits, or {FLOAT_BITS} for floating point")


def check_weight_bits(bits: int, what: str) -> None:
    """Raises ValueError for widths that no kernel multiplies."""
    if 8 < bits < FLOAT_BITS and bits != WIDE_WEIGHT_BITS:
        raise ValueError(
            f"{what} takes 2 to 8 or {WIDE_WEIGHT_BITS} bits, or {FLOAT_BITS} for floating point"
        )
