"""ADM's U-Nets, as guided-diffusion and consistency models name them, -> diffusers' UNet2DModel.

ADM (arXiv 2105.05233, github.com/openai/guided-diffusion) shares the names of CompVis' U-Nets. Its
files come without a description: widths, levels, places of attention and kinds of samplers are read
off the tensors; what they do not tell is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ...errors import ModelError
from .file import some_tensors
from .keys import Source, unet_sources

GROUPS = 32
"""Groups of every norm of ADM (guided_diffusion/nn.py: normalization)."""
_ROW = re.compile(r"(input|output)_blocks\.(\d+)\.")
_KNOWN = "give the weights of a U-Net of guided-diffusion or of consistency models"


@dataclass(frozen=True)
class ADMOptions:
    """What the tensors do not tell: the sides of images, the channels of an attention head, and
    whether a head's query, key and value lie apart (use_new_attention_order, consistency models)
    or together."""

    sample_size: int
    head_channels: int = 64
    stacked: bool = False


def adm_unet(tensors: Mapping[str, Tensor], options: ADMOptions, where: str) -> UNet2DModel:
    """The U-Net of these tensors, in their precision.

    where: of the tensors, for messages. Raises ModelError that names the first tensors that are
    missing, of another shape or not known.
    """
    try:
        described = unet_description(tensors, options)
        with torch.device("meta"):
            unet: Any = UNet2DModel(**described)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ModelError(f"{where}: is no U-Net of ADM ({error})", _KNOWN) from error
    unet_names = unet.state_dict()
    sources = unet_sources(unet_names, described["layers_per_block"])
    state, missing, misshaped = {}, [], []
    for name, wanted in unet_names.items():
        source = sources[name]
        tensor = tensors.get(source.key)
        if tensor is None:
            missing.append(source.key)
            continue
        rows = len(wanted) * (1 if source.part is None else 3)
        if len(tensor) != rows or tensor[:1].numel() != wanted[:1].numel():
            misshaped.append(f"{source.key} is {list(tensor.shape)}")
            continue
        state[name] = _part(tensor, source, options).reshape(wanted.shape).contiguous()
    unknown = sorted(set(tensors) - {source.key for source in sources.values()})
    wrong = [
        some_tensors("missing", missing),
        some_tensors("of another shape", misshaped),
        some_tensors("not known", unknown),
    ]
    if any(wrong):
        raise ModelError(f"{where}: {'; '.join(w for w in wrong if w)}", _KNOWN)
    unet.load_state_dict(state, assign=True)
    return unet


def _part(tensor: Tensor, source: Source, options: ADMOptions) -> Tensor:
    """The query, the key or the value out of the tensor that holds all three, [3 heads d, ...]."""
    if source.part is None:
        return tensor
    heads = 1 if options.stacked else len(tensor) // 3 // options.head_channels
    return tensor.reshape(heads, 3, -1)[:, source.part]


def unet_description(tensors: Mapping[str, Tensor], options: ADMOptions) -> dict[str, Any]:
    """Options of UNet2DModel. Raises KeyError and ValueError for tensors of another model."""
    rows = {
        int(found[2]) for name in tensors if (found := _ROW.match(name)) and found[1] == "input"
    }
    resizing = [row for row in sorted(rows) if _upsampler(tensors, row)]
    levels = len(resizing) + 1
    blocks, rest = divmod(len(rows), levels)
    if rest or not 2 <= blocks <= len(rows):
        raise ValueError(f"{len(rows)} rows in {levels} levels")
    firsts = [1 + blocks * level for level in range(levels)]
    widths = [len(tensors[f"input_blocks.{row}.0.in_layers.2.weight"]) for row in firsts]
    attends = [f"input_blocks.{row}.1.qkv.weight" in tensors for row in firsts]
    conv = any(name.endswith(".0.op.weight") for name in tensors)
    embedded = tensors["input_blocks.1.0.emb_layers.1.weight"]
    if any(w % options.head_channels for w, a in zip(widths, attends, strict=True) if a):
        raise ValueError(f"heads of {options.head_channels} channels")
    plain = ("DownBlock2D", "UpBlock2D")
    if not conv:
        plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    first = tensors["input_blocks.0.0.weight"]
    labels = tensors.get("label_emb.weight")
    return {
        "sample_size": options.sample_size,
        "in_channels": first.shape[1],
        "out_channels": len(tensors["out.2.weight"]),
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks - 1,
        "down_block_types": tuple("AttnDownBlock2D" if a else plain[0] for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else plain[1] for a in attends[::-1]),
        "downsample_type": "conv" if conv else "resnet",
        "upsample_type": "conv" if conv else "resnet",
        "attention_head_dim": options.head_channels,
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,
        "resnet_time_scale_shift": "scale_shift" if len(embedded) == 2 * widths[0] else "default",
        "num_class_embeds": None if labels is None else len(labels),
    }


def _upsampler(tensors: Mapping[str, Tensor], row: int) -> bool:
    """Whether a row on the way up ends in an upsampler, a block or a convolution of its own."""
    start = f"output_blocks.{row}."
    ends = ("in_layers.2.weight", "conv.weight")
    return any(f"{start}{place}.{end}" in tensors for place in (1, 2) for end in ends)
