"""Schedules of rectified-flow pipelines, which depend on the size of the image."""

from __future__ import annotations

from typing import Any

SD3_MAX_SHIFT, FLUX_MAX_SHIFT = 1.16, 1.15
"""The pipelines' own, where the scheduler has none."""
FROM_ONE = "FlowMatchFromOne"
"""The scheduler of `sampling.flow` that sets its steps as FluxPipeline does."""


def shifted(config: dict[str, Any], tokens: int, most: float) -> dict[str, Any]:
    """A flow scheduler's configuration with its shift for images of that many tokens.

    The shift grows linearly with the tokens (SD3, 2403.03206, sec. 5.3.2; FLUX). most: the
    pipeline's default for max_shift.
    """
    if not config.get("use_dynamic_shifting", False):
        return config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", most)
    mu = low + (high - low) * (tokens - few) / (many - few)
    return {**config, "base_shift": mu, "max_shift": mu}
