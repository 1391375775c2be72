"""The section `first_stage` of the configuration: how images are made of latents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import Section


class FirstStageConfig(Section):
    """How images are made of latents."""

    bits: Literal[8] | None = Field(
        None,
        description="of weights, inputs and attention of the decoder (its outer layers read 16), "
        "for quantized models, the rest of it in bfloat16 where model.dtype is; null: float32",
    )
    tile: Annotated[int, Field(ge=32)] | None = Field(
        None,
        description="side in pixels of the overlapping tiles in which larger images are decoded, "
        "with AutoencoderKL: less memory, other pixels; null: whole images",
    )
