"""What is inside a denoiser: layers to quantize, time-embedding layers, smoothing sites, MACs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError
from ..quant.attention_processors import JointProcessor
from ..spec import ATTENTION_OPERANDS
from .control import CONTROLNET

_TIME_LAYERS = re.compile(r"(^|\.)(time_embedding|timestep_embedder)\.linear_[12]$")
_TIME_PROJECTIONS = re.compile(r"(^|\.)time_emb_proj$")
_CONDITIONING_LAYERS = re.compile(
    r"(^|\.)(norm\w*\.linear|adaln_single\.linear|proj_out_1|(text|guidance)_embedder\.linear_[12])$"
)
_FIRST = ("conv_in", "pos_embed.proj", "x_embedder")
_LAST = ("conv_out", "proj_out_2", "proj_out")
ATTENTION = (Attention, FluxAttention)
JOINT = (JointAttnProcessor2_0, FluxAttnProcessor)


@dataclass(frozen=True)
class AttentionSite:
    """An attention module with one of diffusers' two plain processors, or one of joint attention.

    channels: of q, k and v, all heads together; scale: of the scores; qk_norm: whether its
    processor applies the module's norm_q and norm_k (AttnProcessor does not). joint: over text and
    image at once.
    """

    name: str
    channels: int
    scale: float
    qk_norm: bool
    joint: bool


@dataclass(frozen=True)
class LayerCost:
    """macs: multiply-accumulates of one sample; kind: conv, linear or matmul."""

    name: str
    kind: str
    macs: int


def weight_layers(denoiser: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Every convolution and linear layer by name, in the order of the modules."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def time_layers(denoiser: nn.Module) -> set[str]:
    """Names of the layers whose output depends on the timestep alone.

    The projections inside residual blocks are among them unless a class or other embedding is
    added to the timestep's; none is where the guidance scale is (latent consistency models).
    """
    if getattr(getattr(denoiser, "config", None), "time_cond_proj_dim", None) is not None:
        return set()
    added = any(
        getattr(denoiser, p, None) is not None for p in ("class_embedding", "add_embedding")
    )
    return {
        name
        for name in weight_layers(denoiser)
        if _TIME_LAYERS.search(name) or (_TIME_PROJECTIONS.search(name) and not added)
    }


def reconstruction_blocks(denoiser: nn.Module, layers: Iterable[str]) -> dict[str, list[str]]:
    """The layers grouped by the residual or transformer block around them.

    A layer outside of any such block is a block of its own, under its own name (BRECQ, arXiv
    2102.05426, sec. 3.2).
    """
    kinds = (ResnetBlock2D, BasicTransformerBlock)
    blocks = [name for name, module in denoiser.named_modules() if isinstance(module, kinds)]
    grouped: dict[str, list[str]] = {}
    for layer in layers:
        block = next((b for b in blocks if layer.startswith(f"{b}.")), layer)
        grouped.setdefault(block, []).append(layer)
    return grouped


def is_conditioning_layer(name: str) -> bool:
    """Whether a layer computes on one vector per sample: timestep and class, not on features."""
    return bool(_CONDITIONING_LAYERS.search(name) or _TIME_PROJECTIONS.search(name))


def is_outer_layer(name: str) -> bool:
    """Whether a layer is the first or the last of the denoiser."""
    return name.removeprefix(f"{CONTROLNET}.") in _FIRST + _LAST


def is_first_layer(name: str) -> bool:
    """Whether a layer reads the latent itself, and with it the initial noise."""
    return name.removeprefix(f"{CONTROLNET}.") in _FIRST


def skip_boundaries(denoiser: nn.Module) -> dict[str, int]:
    """Layers that read a concatenation of features and a skip connection: channels of the first.

    The first convolution and the shortcut of every residual block on a U-Net's way up.
    """
    found: dict[str, int] = {}
    blocks = getattr(denoiser, "up_blocks", None)
    if blocks is None or getattr(denoiser, "mid_block", None) is None:
        return found
    channels: int = denoiser.get_submodule("mid_block.resnets")[-1].out_channels  # type: ignore
    for i, block in enumerate(blocks):
        for j, resnet in enumerate(getattr(block, "resnets", [])):
            if not isinstance(resnet, ResnetBlock2D):
                continue
            if resnet.in_channels > channels:
                found[f"up_blocks.{i}.resnets.{j}.conv1"] = channels
                if resnet.conv_shortcut is not None:
                    found[f"up_blocks.{i}.resnets.{j}.conv_shortcut"] = channels
            channels = resnet.out_channels
    return found


def attention_sites(denoiser: nn.Module) -> list[AttentionSite]:
    """Attention modules whose matrix products can be quantized, in the order of the modules."""
    sites = []
    for name, module in denoiser.named_modules():
        if not isinstance(module, ATTENTION) or _why_not(module):
            continue
        kind = type(module.processor)
        plain = isinstance(module, Attention) and kind is AttnProcessor
        # the others have 1 / sqrt(d) whatever the module says
        scale = module.scale if plain else (module.inner_dim // module.heads) ** -0.5
        sites.append(AttentionSite(name, module.inner_dim, scale, not plain, kind in JOINT))
    return sites


def float_attention(denoiser: nn.Module) -> dict[str, str]:
    """Attention modules whose products stay in floating point, each with the reason."""
    return {
        name: _why_not(module)
        for name, module in denoiser.named_modules()
        if isinstance(module, ATTENTION) and _why_not(module)
    }


def _why_not(attention: Attention | FluxAttention) -> str:
    """Why the products of an attention module cannot be quantized; empty if they can."""
    kind = type(attention.processor)
    if kind in (AttnProcessor, AttnProcessor2_0, *JOINT):
        return ""
    return f"attention processor {kind.__name__} is not one that can be quantized"


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put module at a dotted name below root."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


@contextmanager
def capture_inputs(
    denoiser: nn.Module, names: list[str], receive: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Within the block, receive(name, input) runs before each named layer does."""
    handles = []
    try:
        for name in names:

            def hook(module, args, name=name):
                receive(name, args[0])

            handles.append(denoiser.get_submodule(name).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_attention(
    denoiser: nn.Module, sites: list[AttentionSite], receive: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Within the block, receive(`<module>.query` or .key or .value, [N, L, channels]) runs
    before the products of each site do, behind norm_q and norm_k where these apply; of joint
    attention with text and image behind each other, and turned by their positions."""
    handles, replaced = [], []
    try:
        for site in sites:
            module: Any = denoiser.get_submodule(site.name)
            if site.joint:
                replaced.append((module, module.processor))
                module.set_processor(_Recording(module.processor, site.name, receive))
                continue
            for operand in ATTENTION_OPERANDS:

                def hook(module, args, output, name=f"{site.name}.{operand}"):
                    if output.ndim == 4:  # behind a norm: [N, heads, L, d]
                        output = output.transpose(1, 2).flatten(2)
                    receive(name, output)

                last = getattr(module, f"norm_{operand[0]}", None) if site.qk_norm else None
                last = getattr(module, f"to_{operand[0]}") if last is None else last
                handles.append(last.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, processor in replaced:
            module.set_processor(processor)


class _Recording(JointProcessor):
    """Computes what `inner` does; receive is called as capture_attention says."""

    def __init__(self, inner: Any, name: str, receive: Callable[[str, Tensor], None]):
        self.inner, self.name, self.receive = inner, name, receive

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        for operand, x in zip(ATTENTION_OPERANDS, (query, key, value), strict=True):
            self.receive(f"{self.name}.{operand}", x.transpose(1, 2).flatten(2))
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)


def step_embeddings(
    denoiser: nn.Module,
    projections: list[str],
    call: Callable[[float], Tensor],
    timesteps: Iterable[float],
) -> dict[str, Tensor]:
    """Outputs of the time projections at each timestep, [S * rows, C] by name.

    call: runs the denoiser once on any input at a timestep; its rows differ in the projections
    only where a class embedding is added.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in projections}
    handles = []
    try:
        for name in projections:

            def hook(module, args, output, name=name):
                rows[name].append(output.detach().float().cpu())

            handles.append(denoiser.get_submodule(name).register_forward_hook(hook))
        for t in timesteps:
            call(t)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(values) for name, values in rows.items()}


def count_macs(denoiser: nn.Module, call: Callable[[], Tensor]) -> list[LayerCost]:
    """MACs of every convolution, linear layer and attention product in one call on one sample."""
    costs: list[LayerCost] = []
    handles = []

    def on_layer(name: str):
        def hook(module, args, output):
            macs = output[0].numel() * module.weight[0].numel()
            kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
            costs.append(LayerCost(name, kind, macs))

        return hook

    def on_attention(name: str):
        def hook(module, args, kwargs, output):
            named = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False))
            named |= kwargs
            x, context = named["hidden_states"], named.get("encoder_hidden_states")
            queries = keys = _positions(x)
            if context is not None and getattr(module, "added_kv_proj_dim", None) is None:
                keys = _positions(context)
            elif context is not None:  # image and text attend to all of both
                queries = keys = queries + _positions(context)
            macs = queries * keys * module.inner_dim
            costs.append(LayerCost(f"{name}.query_key", "matmul", macs))
            costs.append(LayerCost(f"{name}.probabilities_value", "matmul", macs))

        return hook

    try:
        for name, module in denoiser.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                handles.append(module.register_forward_hook(on_layer(name)))
            elif isinstance(module, ATTENTION):
                handles.append(module.register_forward_hook(on_attention(name), with_kwargs=True))
        call()
    finally:
        for handle in handles:
            handle.remove()
    if not costs:
        raise ModelError("the denoiser has no convolution, linear or attention layer")
    return costs


def _positions(x: Tensor) -> int:
    """Positions of one sample: [N, L, C] has L, [N, C, H, W] has H * W."""
    return x[0].numel() // (x.shape[1] if x.ndim == 4 else x.shape[-1])
