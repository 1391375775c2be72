"""One way to call every denoiser: denoiser(x, t, **tensors).sample, of the shape of x.

diffusers' own classes differ; hooks on the module level them, so that copies and replaced layers
keep them. They are not stored with the weights: whoever loads a denoiser calls `level`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_ADDED = ("text_embeds", "time_ids")


def level(denoiser: nn.Module) -> nn.Module:
    """The denoiser itself, with hooks where it needs them; to be called once per module."""
    config: Any = getattr(denoiser, "config", None)
    if getattr(config, "addition_embed_type", None) == "text_time":
        denoiser.register_forward_pre_hook(_gather_added, with_kwargs=True)
    channels = getattr(config, "in_channels", None)
    if channels and getattr(config, "out_channels", None) == 2 * channels:
        denoiser.register_forward_hook(_without_variance)
    return denoiser


def _gather_added(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """SDXL takes its size and pooled text in a dict of their own."""
    added = {name: kwargs.pop(name) for name in _ADDED if name in kwargs}
    return args, {**kwargs, "added_cond_kwargs": added}


def _without_variance(module: nn.Module, args: tuple, output: Any) -> Any:
    """Learned variances (arXiv 2102.09672) are the second half of the channels; samplers with
    few steps have no use for them."""
    return type(output)(sample=output.sample.chunk(2, dim=1)[0])
