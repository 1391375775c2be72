"""A reader of ComfyUI's quantized files, written from the description of the format alone.

QUANTIZATION.md and the loader of comfy/ops.py (github.com/Comfy-Org/ComfyUI) say what a file holds,
comfy_kitchen/backends/eager (github.com/Comfy-Org/comfy-kitchen) what the tensors stand for.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file
from torch import Tensor

PREFIX = "model.diffusion_model."
PARTS = ("weight", "weight_scale", "weight_s_rel", "weight_s_channel", "weight_codebook")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Parameters in float32 by their names, and what the file says of its quantized layers."""
    stored = load_file(path)
    assert all(name.startswith(PREFIX) for name in stored)
    stored = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    marks = {}
    for name in [name for name in stored if name.endswith(".comfy_quant")]:
        assert stored[name].dtype == torch.uint8
        marks[name.removesuffix(".comfy_quant")] = json.loads(bytes(stored.pop(name).tolist()))
    found = {}
    for layer, mark in marks.items():
        parts = {p: stored.pop(f"{layer}.{p}") for p in PARTS if f"{layer}.{p}" in stored}
        found[f"{layer}.weight"] = weight_of(mark, parts)
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16, name
        found[name] = tensor.float()
    return found, marks


def weight_of(mark: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    if mark["format"] == "int8_tensorwise":
        weight, scale = parts.pop("weight"), parts.pop("weight_scale")
        assert (weight.dtype, scale.dtype) == (torch.int8, torch.float32)
        assert list(scale.shape) == [len(weight), 1]
        group = mark["convrot_groupsize"] if mark.get("convrot") else 0
        rows = weight.float() * scale
    else:
        assert mark["format"] == "asym_w4a8_int8"
        packed = parts.pop("weight").view(torch.uint8)
        codes = torch.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
        relative = parts.pop("weight_s_rel").float().repeat_interleave(mark["group_size"], 1)
        values = parts.pop("weight_codebook")[codes.long()] * relative
        rows = values.round().clamp(-127, 127) * parts.pop("weight_s_channel")[:, None]
        group = mark["convrot_groupsize"]
    assert not parts
    if not group:
        return rows
    return (rows.reshape(len(rows), -1, group) @ hadamard(group)).reshape(rows.shape)


def hadamard(size: int) -> Tensor:
    base = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.kron(found, base)
    return found / size**0.5


def in_diffusers_names(found: dict[str, Tensor], denoiser: Any) -> dict[str, Tensor]:
    """The same parameters by diffusers' own converters."""
    named = {PREFIX + name: tensor for name, tensor in found.items()}
    kind = type(denoiser).__name__
    if kind == "UNet2DConditionModel":
        return single_file_utils.convert_ldm_unet_checkpoint(named, dict(denoiser.config))
    if kind == "SD3Transformer2DModel":
        return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(named)
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    width = denoiser.config.num_attention_heads * denoiser.config.attention_head_dim
    assert "inner_dim = 3072" in source
    space = dict(vars(single_file_utils))
    exec(textwrap.dedent(source.replace("inner_dim = 3072", f"inner_dim = {width}")), space)
    return space["convert_flux_transformer_checkpoint_to_diffusers"](named)
