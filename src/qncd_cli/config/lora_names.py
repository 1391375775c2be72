"""LoRA files as options name them, each with its weight."""

from __future__ import annotations

import math


def split_lora(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT -> the file and its weight, 1 by itself. Raises ValueError."""
    path, colon, said = text.rpartition(":")
    if not colon or said.endswith(".safetensors"):
        return text, 1.0
    try:
        weight = float(said)
    except ValueError:
        weight = math.nan
    if not path or not math.isfinite(weight):
        raise ValueError(f"lora {text}: FILE or FILE:WEIGHT, e.g. style.safetensors:0.8")
    return path, weight
