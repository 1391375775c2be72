"""LoRA files, fused into a pipeline before anything else is done with it.

W + weight (alpha / rank) B A, in float32 (Hu et al. 2021, arXiv 2106.09685). The names of kohya's
trainers, of diffusers and of PEFT are read by diffusers, the layers are PEFT's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from ..config.sampling import split_lora
from ..errors import ModelError
from .folder_check import reason

DOWN = ("lora_down.weight", "lora.down.weight", "lora_A.weight", "lora_A.default.weight")
"""How the names of A end, one a layer."""
OTHER_KINDS = {"dora_scale": "DoRA", "hada_w": "LoHa", "lokr_": "LoKr"}
"""What names of tensors hold that belong to other adapters."""


def fuse(pipeline: DiffusionPipeline, loras: Sequence[str], source: str) -> None:
    """Add the LoRAs' products to the weights of the pipeline's parts, which keep their types.

    loras: FILE or FILE:WEIGHT each; source: names the pipeline in errors.
    Raises ModelError for a file that is no LoRA, that has layers which the pipeline does not have,
    or whose sizes do not fit; for a pipeline that takes none; without the package peft.
    """
    if not loras:
        return
    loader: Any = pipeline
    if not hasattr(pipeline, "load_lora_weights"):
        raise ModelError(
            f"{source}: pipeline {type(pipeline).__name__} takes no LoRA",
            "leave model.lora (--lora) out",
        )
    if importlib.util.find_spec("peft") is None:
        raise ModelError("model.lora needs the package peft", "pip install peft")
    modules = {k: m for k, m in pipeline.components.items() if isinstance(m, nn.Module)}
    types = {name: next(module.parameters()).dtype for name, module in modules.items()}
    for module in modules.values():
        module.to(torch.float32)
    for lora in loras:
        path, weight = split_lora(lora)
        wanted = _layers_of(path)
        try:
            loader.load_lora_weights(path)
        except Exception as error:  # diffusers and PEFT raise many kinds; all mean: does not fit
            raise ModelError(
                f"{path}: does not fit {source}: {reason(error)}",
                "is it a LoRA of another model?",
            ) from error
        found = sum(_adapted(module) for module in modules.values())
        if found != wanted:
            raise ModelError(
                f"{path}: {wanted - found} of {wanted} layers are not in {source}",
                "is it a LoRA of another model?",
            )
        loader.fuse_lora(components=list(loader.get_list_adapters()), lora_scale=weight)
        loader.unload_lora_weights()
    for name, module in modules.items():
        module.to(types[name])


def _layers_of(path: str) -> int:
    """The number of layers that a file changes, by its names. Raises ModelError."""
    if Path(path).suffix != ".safetensors":
        raise ModelError(f"{path}: not a .safetensors file", "other formats can hold code")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {error}", "is it a whole LoRA file?") from error
    for mark, kind in OTHER_KINDS.items():
        if any(mark in name for name in names):
            raise ModelError(f"{path}: is a {kind}, not a LoRA", "merge it with its own tool")
    count = sum(name.endswith(DOWN) for name in names)
    if not count:
        raise ModelError(
            f"{path}: is no LoRA (no tensor ends in {' or '.join(DOWN[:3])})", "give a LoRA file"
        )
    return count


def _adapted(module: nn.Module) -> int:
    """Layers of a module that have an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sum(isinstance(layer, BaseTunerLayer) for layer in module.modules())
