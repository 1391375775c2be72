"""Parameter names in diffusers -> names in ComfyUI's files, which are those of the models' authors.

U-Nets have CompVis' (models/compvis/keys.py), Stable Diffusion 3 those of sd3-ref
(github.com/Stability-AI/sd3-ref, mmdit.py), FLUX those of github.com/black-forest-labs/flux. There,
query, key and value are one layer, and so is all that reads the same input in a block of FLUX with
one stream; the last norm has its shift before its scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from ..errors import ModelError
from .compvis.keys import UNET, unet_sources

PREFIX = UNET
"""Beginning of all names: where ComfyUI looks for the denoiser in a checkpoint."""


@dataclass(frozen=True)
class Place:
    """Where a parameter is in the file.

    key: name there, below PREFIX. part: its rank among those that one tensor joins along the
    outputs. swapped: the second half of its outputs comes first there.
    """

    key: str
    part: int = 0
    swapped: bool = False


_EMBEDDERS = {
    "timestep_embedder": ("t_embedder", "time_in"),
    "text_embedder": ("y_embedder", "vector_in"),
    "guidance_embedder": ("", "guidance_in"),
}
_QKV = {"q": 0, "k": 1, "v": 2}
_EMBEDDER = re.compile(r"time_text_embed\.(\w+)\.linear_([12])")
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")
_PROJECTION = re.compile(r"(attn2?)\.(?:to|add)_([qkv])(?:_proj)?")
_NORM = re.compile(r"(attn2?)\.norm_(added_)?([qk])")
_FEED_FORWARD = re.compile(r"ff(?:_context)?\.net\.(0\.proj|2)")


def places(denoiser: Any) -> dict[str, Place]:
    """The place of every parameter. Raises ModelError for a model that ComfyUI has no names for."""
    names = list(denoiser.state_dict())
    kind = type(denoiser).__name__
    try:
        if isinstance(denoiser, UNet2DConditionModel):
            sources = unet_sources(names, denoiser.config.layers_per_block)
            return {name: Place(source.key) for name, source in sources.items()}
        if isinstance(denoiser, SD3Transformer2DModel):
            last = f"transformer_blocks.{len(denoiser.transformer_blocks) - 1}."
            return _placed(names, lambda layer: _sd3(layer, layer.startswith(last)))
        if isinstance(denoiser, FluxTransformer2DModel):
            return _placed(names, _flux)
    except KeyError as error:
        raise ModelError(
            f"{kind} with {error.args[0]} has no counterpart in ComfyUI's names", _KNOWN
        ) from error
    raise ModelError(f"ComfyUI has no names for a {kind}", _KNOWN)


_KNOWN = "U-Nets of Stable Diffusion and SDXL, transformers of Stable Diffusion 3 and FLUX have one"


def known_sizes(denoiser: Any) -> bool:
    """Whether a published model has these sizes: ComfyUI tells models apart by them."""
    config = denoiser.config
    if isinstance(denoiser, UNet2DConditionModel):
        return config.block_out_channels[0] == 320 and config.cross_attention_dim in (
            *(768, 1024, 1280, 2048),
        )
    width = config.num_attention_heads * config.attention_head_dim
    if isinstance(denoiser, FluxTransformer2DModel):
        return bool(width == 3072)
    return bool(width == 64 * config.num_layers)


def _placed(names: Iterable[str], place: Callable[[str], Place]) -> dict[str, Place]:
    """place: of a layer, by its name."""
    found = {}
    for name in names:
        layer, _, leaf = name.rpartition(".")
        there = place(layer)
        key = there.key if there.key.endswith(".scale") else f"{there.key}.{leaf}"
        found[name] = Place(key.removeprefix("."), there.part, there.swapped)
    return found


def _embedder(layer: str, family: int, ends: tuple[str, str]) -> Place | None:
    """A layer of the embeddings of time, text and guidance. ends: names of the two layers there."""
    found = _EMBEDDER.fullmatch(layer)
    if found is None:
        return None
    return Place(f"{_EMBEDDERS[found[1]][family]}.{ends[int(found[2]) - 1]}")


_SD3_ENDS = {
    "pos_embed": Place(""),
    "pos_embed.proj": Place("x_embedder.proj"),
    "context_embedder": Place("context_embedder"),
    "proj_out": Place("final_layer.linear"),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
}
_SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}


def _sd3(layer: str, last: bool) -> Place:
    """last: of the last block, whose text goes no further and has a norm like the final one."""
    place = _SD3_ENDS.get(layer) or _embedder(layer, 0, ("mlp.0", "mlp.2"))
    if place is not None:
        return place
    block = _block(layer)
    inner, start = block[3], f"joint_blocks.{block[2]}."
    if found := _PROJECTION.fullmatch(inner):
        side = "context_block" if ".add_" in inner else "x_block"
        return Place(f"{start}{side}.{found[1]}.qkv", _QKV[found[2]])
    if found := _NORM.fullmatch(inner):
        return Place(f"{start}{'context' if found[2] else 'x'}_block.{found[1]}.ln_{found[3]}")
    if found := _FEED_FORWARD.fullmatch(inner):
        side = "context_block" if inner.startswith("ff_context") else "x_block"
        return Place(f"{start}{side}.mlp.{'fc2' if found[1] == '2' else 'fc1'}")
    return Place(f"{start}{_SD3_BLOCK[inner]}", swapped=last and inner == "norm1_context.linear")


_FLUX_ENDS = {
    "x_embedder": Place("img_in"),
    "context_embedder": Place("txt_in"),
    "proj_out": Place("final_layer.linear"),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
}
_FLUX_BLOCK = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}
_FLUX_SINGLE = {
    "norm.linear": Place("modulation.lin"),
    "proj_mlp": Place("linear1", 3),
    "proj_out": Place("linear2"),
}


def _flux(layer: str) -> Place:
    place = _FLUX_ENDS.get(layer) or _embedder(layer, 1, ("in_layer", "out_layer"))
    if place is not None:
        return place
    block = _block(layer)
    inner, single = block[3], block[1] is not None
    start = f"{'single' if single else 'double'}_blocks.{block[2]}."
    if found := _PROJECTION.fullmatch(inner):
        name = "linear1" if single else f"{'txt' if '.add_' in inner else 'img'}_attn.qkv"
        return Place(f"{start}{name}", _QKV[found[2]])
    if found := _NORM.fullmatch(inner):
        name = "norm" if single else f"{'txt' if found[2] else 'img'}_attn.norm"
        which = {"q": "query", "k": "key"}[found[3]]
        return Place(f"{start}{name}.{which}_norm.scale")
    if single:
        place = _FLUX_SINGLE[inner]
        return Place(f"{start}{place.key}", place.part)
    if found := _FEED_FORWARD.fullmatch(inner):
        side = "txt" if inner.startswith("ff_context") else "img"
        return Place(f"{start}{side}_mlp.{'2' if found[1] == '2' else '0'}")
    return Place(f"{start}{_FLUX_BLOCK[inner]}")


def _block(layer: str) -> re.Match[str]:
    found = _BLOCK.fullmatch(layer)
    if found is None:
        raise KeyError(layer)
    return found
