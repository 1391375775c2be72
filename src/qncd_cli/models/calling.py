"""One way to call every denoiser: denoiser(x, t, **tensors).sample, of the shape of x.

diffusers' own classes differ; hooks on the module level them, so that copies and replaced layers
keep them. They are not stored with the weights: whoever loads a denoiser calls `level`.
"""

from __future__ import annotations

import functools
from typing import Any

from diffusers import PixArtTransformer2DModel
from torch import nn


def level(denoiser: nn.Module) -> nn.Module:
    """The denoiser itself, with hooks where it needs them; to be called once per module."""
    config: Any = getattr(denoiser, "config", None)
    added: tuple[str, ...] = ()
    if getattr(config, "addition_embed_type", None) == "text_time":
        added = ("text_embeds", "time_ids")
    elif isinstance(denoiser, PixArtTransformer2DModel):
        added = ("resolution", "aspect_ratio")
    if added:
        gather = functools.partial(_gather_added, added)
        denoiser.register_forward_pre_hook(gather, with_kwargs=True)
    channels = getattr(config, "in_channels", None)
    if channels and getattr(config, "out_channels", None) == 2 * channels:
        denoiser.register_forward_hook(_without_variance)
    return denoiser


def _gather_added(
    names: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple:
    """SDXL takes its size and pooled text in a dict of their own, PixArt its size, if any.

    PixArt's second argument is not the timestep, so that it has to go by name.
    """
    added = {name: kwargs.pop(name, None) for name in names}
    named = dict(zip(("timestep",), args[1:], strict=False))
    return args[:1], {**named, **kwargs, "added_cond_kwargs": added}


def _without_variance(module: nn.Module, args: tuple, output: Any) -> Any:
    """Learned variances (arXiv 2102.09672) are the second half of the channels; samplers with
    few steps have no use for them."""
    return type(output)(sample=output.sample.chunk(2, dim=1)[0])
