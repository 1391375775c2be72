"""Where a timestep embedding widens features in front of layers (docs/method.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import nn

_QUERY_KEY_VALUE = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_FIRST_OF_FEED_FORWARD = "net.0.proj"


@dataclass(frozen=True)
class SmoothingSite:
    """Where a timestep embedding widens the features in front of some layers.

    layers: names of those that share the features; projection: of the embedding, [.., k C];
    norm: the GroupNorm between the two (additive and scale-shift blocks) or None (adaptive layer
    norm); kind: additive, scale_shift or adaptive_norm; part, parts: which of the k equal parts
    of the projection's output matters (the addend, or the scale). table: parameter [k, C] that is
    added to them, where blocks share one projection.
    """

    layers: tuple[str, ...]
    projection: str
    norm: str | None
    kind: str
    part: int
    parts: int
    table: str | None = None


def smoothing_sites(denoiser: nn.Module) -> list[SmoothingSite]:
    """Residual blocks that take a timestep embedding, and blocks with adaptive layer norm."""
    sites: list[SmoothingSite] = []
    for name, module in denoiser.named_modules():
        if isinstance(module, ResnetBlock2D) and module.time_emb_proj is not None:
            sites.append(_residual_site(name, module))
        elif isinstance(module, BasicTransformerBlock):
            sites += _transformer_sites(name, module)
        elif isinstance(module, JointTransformerBlock | FluxTransformerBlock):
            sites += _joint_sites(name, module)
        elif isinstance(module, FluxSingleTransformerBlock):
            layers = (*(f"attn.{layer}" for layer in _QUERY_KEY_VALUE), "proj_mlp")
            sites += _norm_sites(name, module.norm, "norm", {"scale": layers})
    present = set(dict(denoiser.named_modules()))
    kept = (replace(s, layers=tuple(n for n in s.layers if n in present)) for s in sites)
    return [site for site in kept if site.layers]


def _residual_site(name: str, block: ResnetBlock2D) -> SmoothingSite:
    scale_shift = block.time_embedding_norm == "scale_shift"
    kind, parts = ("scale_shift", 2) if scale_shift else ("additive", 1)
    projection, norm = f"{name}.time_emb_proj", f"{name}.norm2"
    return SmoothingSite((f"{name}.conv2",), projection, norm, kind, 0, parts)


def _transformer_sites(name: str, block: BasicTransformerBlock) -> Iterator[SmoothingSite]:
    """DiT, whose blocks have a projection each, and PixArt, whose blocks share one."""
    readers = {
        "scale": tuple(f"attn1.{layer}" for layer in _QUERY_KEY_VALUE),
        "feed-forward scale": (f"ff.{_FIRST_OF_FEED_FORWARD}",),
    }
    yield from _norm_sites(name, block.norm1, "norm1", readers)
    if block.norm_type == "ada_norm_single":
        parts, scales = SCALES[AdaLayerNormZero]
        for scale, part in scales.items():
            layers = tuple(f"{name}.{layer}" for layer in readers[scale])
            shared, table = "adaln_single.linear", f"{name}.scale_shift_table"
            yield SmoothingSite(layers, shared, None, "adaptive_norm", part, parts, table)


def _joint_sites(name: str, block: nn.Module) -> Iterator[SmoothingSite]:
    """SD3 and FLUX: image and text have norms of their own in front of one attention."""
    for suffix, projections in (("", _QUERY_KEY_VALUE), ("_context", _ADDED)):
        readers = {
            "scale": tuple(f"attn.{layer}" for layer in projections),
            "feed-forward scale": (f"ff{suffix}.{_FIRST_OF_FEED_FORWARD}",),
            "second scale": tuple(f"attn2.{layer}" for layer in _QUERY_KEY_VALUE),
        }
        norm = f"norm1{suffix}"
        yield from _norm_sites(name, block.get_submodule(norm), norm, readers)


SCALES: dict[type[nn.Module], tuple[int, dict[str, int]]] = {
    AdaLayerNormContinuous: (2, {"scale": 0}),
    AdaLayerNormZeroSingle: (3, {"scale": 1}),
    AdaLayerNormZero: (6, {"scale": 1, "feed-forward scale": 4}),
    SD35AdaLayerNormZeroX: (9, {"scale": 1, "feed-forward scale": 4, "second scale": 7}),
}
"""Adaptive layer norm -> the parts of its projection, and which of them scale what."""


def _norm_sites(
    block: str, norm: nn.Module, norm_name: str, readers: dict[str, tuple[str, ...]]
) -> Iterator[SmoothingSite]:
    """readers: which scale -> the layers behind it, by their names in the block."""
    parts, scales = SCALES.get(type(norm), (0, {}))
    for scale, part in scales.items():
        if scale in readers:
            layers = tuple(f"{block}.{layer}" for layer in readers[scale])
            projection = f"{block}.{norm_name}.linear"
            yield SmoothingSite(layers, projection, None, "adaptive_norm", part, parts)
