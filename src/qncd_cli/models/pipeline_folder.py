"""A pipeline folder as diffusers loads it, with a reason where it cannot."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..errors import ModelError
from .denoiser_folder import check_weights
from .folder_check import check_folder, is_there, read_index, reason
from .pipelines import CLASS_CONDITIONAL
from .prompt_length import Tell
from .variant_parts import variant_parts

FIRST_STAGES = ("vae", "vqvae")
"""Components that always compute in float32, as SDXL's has to."""
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
LEFT_OUT = {"StableDiffusion3Pipeline": ("text_encoder_3", "tokenizer_3")}
"""Parts that a folder of that class can have been saved without, and works without."""


def load_pipeline(
    folder: Path,
    source: str,
    dtype: torch.dtype | None,
    left_out: Collection[str],
    tell: Tell,
    given: Mapping[str, nn.Module] = MappingProxyType({}),
) -> DiffusionPipeline:
    """dtype: to load parts in, None as they are stored, the first stage in float32 in any case.

    left_out: parts that are not read; given: parts that are read from elsewhere. Raises ModelError.
    """
    index = read_index(folder, source)
    check_folder(folder, source, index)
    libraries = {part[0] for part in index.values() if isinstance(part, list) and part}
    if "transformers" in libraries and importlib.util.find_spec("transformers") is None:
        raise ModelError(
            f"{source}: its text encoder needs the package transformers",
            "pip install transformers",
        )
    if "transformers" in libraries:
        _silence_transformers()
    name = index["_class_name"]
    try:
        loader = CLASS_CONDITIONAL.get(name, DiffusionPipeline)
        options: dict[str, Any] = {part: None for part in left_out if part in index}
        options |= {part: None for part in LEFT_OUT.get(name, ()) if not is_there(index, part)}
        options |= given
        options |= variant_parts(folder, index, options, lambda part: _own(part, dtype), tell)
        if options.get("safety_checker", ...) is None and "requires_safety_checker" in index:
            options["requires_safety_checker"] = False
        if dtype is not None:
            first = {part: torch.float32 for part in FIRST_STAGES if part in index}
            options["dtype"] = {"default": dtype, **first}
        pipeline = loader.from_pretrained(str(folder), local_files_only=True, **options)
        for part, module in pipeline.components.items():
            if part not in given:
                check_weights(module, folder / part)
        return pipeline
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(
            f"{source}: cannot be loaded: {reason(error)}", "install that package"
        ) from error
    except Exception as error:  # a broken folder fails in as many ways as it can be broken
        raise ModelError(
            f"{source}: cannot be loaded: {reason(error)}", "is the folder complete?"
        ) from error


def _own(part: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """Type that a component is loaded in; None: as it is stored."""
    return torch.float32 if dtype is not None and part in FIRST_STAGES else dtype


def _silence_transformers() -> None:
    """Silence transformers for the rest of this process: our errors say what it has to say."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
