"""Parameter names in diffusers -> names in CompVis latent-diffusion checkpoints.

CompVis numbers the blocks of a U-Net in rows (input_blocks, middle_block, output_blocks), where a
downsampler is a row of its own and an upsampler the last part of its row; diffusers nests them by
resolution. Names as in ldm/modules/diffusionmodules/{openaimodel,model}.py, ldm/modules/ema.py of
github.com/CompVis/latent-diffusion; Stable Diffusion has kept them. diffusers has converters for
some of these names (loaders/single_file_utils.py), but they skip what they do not know; here every
parameter has exactly one source, so that a missing one can be named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

UNET, FIRST_STAGE, COND_STAGE = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.",
)
EMA = "model_ema."

_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "add_embedding.linear_1": "label_emb.0.0",  # of SDXL
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Of attention without a transformer around it: q, k and v are one tensor.
_ATTENTION = {"group_norm": "norm", "to_out.0": "proj_out"}
_QKV = {"to_q": 0, "to_k": 1, "to_v": 2}
_FIRST_STAGE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_PART = re.compile(
    r"(?P<way>down|up|mid)_block(?:s\.(?P<level>\d+))?"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<layer>.+)"
)


@dataclass(frozen=True)
class Source:
    """key: in the checkpoint; part: 0, 1 or 2 where q, k and v are one tensor, else None.

    stacked: whether that tensor has all of q, then all of k, then all of v, else head by head.
    """

    key: str
    part: int | None = None
    stacked: bool = False


def unet_sources(names: Iterable[str], res_blocks: int) -> dict[str, Source]:
    """Source of each of a U-Net's parameters; keys below `model.diffusion_model.`.

    res_blocks: residual blocks of one resolution on the way down. Raises KeyError for a parameter
    that CompVis' U-Net has no counterpart of.
    """
    names = list(names)
    attending = {name.partition(".attentions.")[0] for name in names if ".attentions." in name}
    sources = {}
    for name in names:
        layer, _, leaf = name.rpartition(".")
        found = _PART.fullmatch(layer)
        if found is None:
            sources[name] = Source(f"{_ENDS[layer]}.{leaf}")
            continue
        inner, part = _unet_layer(found["way"], found["kind"], found["layer"])
        row = _unet_row(found, res_blocks, layer.partition(".upsamplers.")[0] in attending)
        sources[name] = Source(f"{row}.{inner}.{leaf}", part)
    return sources


def _unet_row(found: re.Match, res_blocks: int, attends: bool) -> str:
    """Number of the row, and of the part in it. attends: whether the up block has attention."""
    kind, index = found["kind"], int(found["index"])
    if found["way"] == "mid":
        return f"middle_block.{2 * index if kind == 'resnets' else 2 * index + 1}"
    rows_before = int(found["level"]) * (res_blocks + 1)
    if found["way"] == "down":
        row = 1 + rows_before + (res_blocks if kind == "downsamplers" else index)
        return f"input_blocks.{row}.{int(kind == 'attentions')}"
    row = rows_before + (res_blocks if kind == "upsamplers" else index)
    position = {"resnets": 0, "attentions": 1, "upsamplers": 1 + attends}[kind]
    return f"output_blocks.{row}.{position}"


def _unet_layer(way: str, kind: str, layer: str) -> tuple[str, int | None]:
    if kind == "attentions":
        if layer in _QKV:
            return "qkv", _QKV[layer]
        return _ATTENTION.get(layer, layer), None  # a transformer's layers have the same names
    if layer == "conv":  # of a sampler; ADM's are residual blocks
        return ("op" if way == "down" else "conv"), None
    return _RESNET[layer], None


def first_stage_sources(names: Iterable[str], levels: int) -> dict[str, Source]:
    """Source of an autoencoder's parameters, below `first_stage_model.`. levels: resolutions."""
    sources = {}
    for name in names:
        layer, _, leaf = name.rpartition(".")
        side, _, rest = layer.partition(".")
        found = _PART.fullmatch(rest)
        if found is None:  # conv_in, conv_out, quantize.embedding, ... have the same names
            sources[name] = Source(name.replace("conv_norm_out", "norm_out"))
            continue
        inner, index = found["layer"], int(found["index"])
        if found["kind"] == "resnets":
            block = f"block_{index + 1}" if found["way"] == "mid" else f"block.{index}"
            inner = f"{block}.{'nin_shortcut' if inner == 'conv_shortcut' else inner}"
        elif found["kind"] == "attentions":
            block = f"attn_{index + 1}" if found["way"] == "mid" else f"attn.{index}"
            inner = f"{block}.{_FIRST_STAGE_ATTENTION[inner]}"
        else:
            inner = f"{found['kind'].removesuffix('rs')}.{inner}"
        sources[name] = Source(f"{side}.{_first_stage_level(found, levels)}.{inner}.{leaf}")
    return sources


def _first_stage_level(found: re.Match, levels: int) -> str:
    """CompVis counts levels from the image on the way up too."""
    if found["way"] == "mid":
        return "mid"
    level = int(found["level"])
    return f"down.{level}" if found["way"] == "down" else f"up.{levels - 1 - level}"


def ema_key(key: str) -> str:
    """Where the moving average of `model.diffusion_model.<key>` is: a buffer's name has no dots."""
    return f"{EMA}diffusion_model{key.replace('.', '')}"
