"""A denoiser alone on disk, as diffusers stores it: without the pipeline around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    logging,
)
from safetensors import safe_open
from torch import nn

from ..errors import ModelError
from .call_signature import unify_call
from .weight_files import named, variant_of

FORMATS = (
    (SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME),
    (WEIGHTS_INDEX_NAME, WEIGHTS_NAME),
)
"""Index of the shards, and the file that holds all: in the order in which diffusers looks."""


def save_denoiser(denoiser: Any, folder: Path) -> None:
    """config.json and safetensors, in the dtype that the denoiser has."""
    denoiser.save_pretrained(folder)


def load_denoiser(folder: Path, dtype: torch.dtype) -> nn.Module:
    """What save_denoiser wrote, in eval mode and without gradients, on the CPU."""
    logging.set_verbosity_error()
    denoiser = AutoModel.from_pretrained(str(folder), torch_dtype=dtype, local_files_only=True)
    return unify_call(denoiser.eval().requires_grad_(False))


def first_not_finite(part: nn.Module) -> str | None:
    """Name of the first stored tensor that holds a NaN or an infinity."""
    for name, tensor in part.state_dict().items():
        if not tensor.is_floating_point() or torch.isfinite(tensor.sum(dtype=torch.float32)):
            continue
        if not torch.isfinite(tensor).all():  # the sum of finite values may overflow
            return name
    return None


def check_values(part: nn.Module, where: str) -> None:
    """Raise ModelError where a weight is a NaN or an infinity. where: of the part, for messages.

    One pass at the speed of the memory.
    """
    name = first_not_finite(part)
    if name is None:
        return
    tensor = part.state_dict()[name]
    hint = "the file is damaged, or was written by a training that diverged"
    if tensor.dtype == torch.float16:
        hint += "; if it is not, it is too large for float16: set model.dtype: bfloat16 or float32"
    raise ModelError(f"{where}: tensor {name} is not finite", hint)


def check_weights(part: Any, folder: Path) -> None:
    """Raise ModelError unless the folder's weights are those of the part, name by name.

    diffusers fills what is missing with random numbers and leaves the rest out, with a warning.
    """
    names = _stored_names(folder)
    if names is None or not isinstance(part, ModelMixin):
        return
    adapted = sorted(name for name in names if "lora_" in name or ".base_layer." in name)
    if adapted:
        raise ModelError(
            f"{folder}: holds LoRA weights (first: {adapted[0]})",
            "fuse them into the model first (diffusers: fuse_lora, unload_lora_weights)",
        )
    shown = sorted(name for name in names if "_ip." in name)
    if shown:
        raise ModelError(
            f"{folder}: an IP-Adapter is part of it (first: {shown[0]}), whose images are not read "
            "here",
            "unload it (diffusers: unload_ip_adapter) and save the pipeline again",
        )
    found: Any = dict.fromkeys(names)
    part._fix_state_dict_keys_on_load(found)  # attention of old checkpoints goes by other names
    expected = set(part.state_dict())
    problems = {"missing": expected - set(found), "unexpected": set(found) - expected}
    for problem, which in problems.items():
        if which:
            raise ModelError(
                f"{folder}: {len(which)} of {len(expected)} tensors {problem} "
                f"(first: {min(which)})",
                "is it another architecture than its config.json says?",
            )


def _stored_names(folder: Path) -> list[str] | None:
    """Names of the tensors in the weights that are loaded, as the files say; None: in another
    format."""
    variant = variant_of(folder)
    for index_name, whole_name in FORMATS:
        index, whole = (folder / named(name, variant) for name in (index_name, whole_name))
        if index.is_file():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [name for shard in sorted(shards) for name in _names_in(folder / shard)]
        if whole.is_file():
            return _names_in(whole)
    return None


def _names_in(path: Path) -> list[str]:
    """Names of the tensors in a weights file. Raises ModelError for one that is not there."""
    if not path.is_file():
        raise ModelError(f"{path}: is missing", "get the weights again")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    return list(torch.load(path, map_location="meta", weights_only=True))
