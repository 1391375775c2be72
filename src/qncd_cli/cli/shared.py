"""What several commands need."""

from __future__ import annotations

from typing import Any

from ..config import Config


def open_model(config: Config, device: str = "auto") -> Any:
    """The configured model, with diffusers silenced: what it has to say is said by our errors."""
    from diffusers.utils import logging

    from ..models.loading import load_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load_model(config.model.source, config.model.dtype, device)
