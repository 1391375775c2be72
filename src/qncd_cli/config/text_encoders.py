"""The section `text_encoders` of the configuration: what prompts are encoded by."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .section import Section


class TextEncodersConfig(Section):
    """What prompts are encoded by."""

    bits: Literal[4, 8] | None = Field(
        None,
        description="of the text encoders' linear layers, for quantized models: 8 for weights and "
        "inputs, 4 for weights alone; null: floating point",
    )
