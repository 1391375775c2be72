"""A denoiser alone on disk, as diffusers stores it: without the pipeline around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from diffusers.utils import logging
from torch import nn

from .calling import level


def save_denoiser(denoiser: Any, folder: Path) -> None:
    """config.json and safetensors, in the dtype that the denoiser has."""
    denoiser.save_pretrained(folder)


def load_denoiser(folder: Path, dtype: torch.dtype) -> nn.Module:
    """What save_denoiser wrote, in eval mode and without gradients, on the CPU."""
    logging.set_verbosity_error()
    denoiser = AutoModel.from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True)
    return level(denoiser.eval().requires_grad_(False))
