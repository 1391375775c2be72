"""One way to call every denoiser: denoiser(x, t, **tensors).sample, of the shape of x.

diffusers' own classes differ; hooks on the module unify them, so that copies and replaced layers
keep them. They are not stored with the weights: whoever loads a denoiser calls
`unify_call`.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError
from .control import CONTROLNET, steer
from .start_images import BESIDE

INPAINTING = 9
"""Channels of a U-Net that reads latents, a mask and the latents of what is left."""


def unify_call(denoiser: nn.Module) -> nn.Module:
    """The denoiser itself, with hooks where it needs them; to be called once per module."""
    config: Any = getattr(denoiser, "config", None)
    added: tuple[str, ...] = ()
    if getattr(config, "addition_embed_type", None) == "text_time":
        added = ("text_embeds", "time_ids")
    elif isinstance(denoiser, PixArtTransformer2DModel):
        added = ("resolution", "aspect_ratio")
    if isinstance(denoiser, PixArtTransformer2DModel | SD3Transformer2DModel):
        denoiser.register_forward_pre_hook(_timestep_by_name, with_kwargs=True)
    elif isinstance(denoiser, FluxTransformer2DModel):
        tokens = _Tokens()
        denoiser.register_forward_pre_hook(tokens.of_image, with_kwargs=True)
        denoiser.register_forward_hook(tokens.as_image)
    if getattr(config, "in_channels", 0) == INPAINTING:
        denoiser.register_forward_pre_hook(_beside, with_kwargs=True)
    if added:
        gather = functools.partial(_gather_added, added)
        denoiser.register_forward_pre_hook(gather, with_kwargs=True)
    if hasattr(denoiser, CONTROLNET):
        denoiser.register_forward_pre_hook(steer, with_kwargs=True)
    channels = getattr(config, "in_channels", None)
    if channels and getattr(config, "out_channels", None) == 2 * channels:
        denoiser.register_forward_hook(_without_variance)
    return denoiser


def as_its_class(denoiser: nn.Module) -> nn.Module:
    """The same module, called as its class says: without the hooks of `unify_call`."""
    own = copy.copy(denoiser)
    for hooks in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks"):
        setattr(own, hooks, OrderedDict())
    return own


def check_inputs(denoiser: nn.Module, given: Collection[str], source: str) -> None:
    """Raise ModelError where a denoiser cannot do without an input that its pipeline lacks.

    given: names of what it is called with beside latents and timestep.
    """
    config: Any = getattr(denoiser, "config", {})
    needed = {
        "class_labels": config.get("class_embed_type") or config.get("num_class_embeds"),
        "image_embeds": "image" in str(config.get("addition_embed_type"))
        or "image" in str(config.get("encoder_hid_dim_type")),
    }
    for name, why in needed.items():
        if why and name not in given:
            raise ModelError(
                f"{source}: its {type(denoiser).__name__} takes {name}, which its pipeline class "
                "does not give",
                "only pipelines that say all that their denoiser reads can be sampled",
            )


def training_timestep(denoiser: nn.Module, timestep: Any) -> float:
    """The timestep, 0 to 1000, behind what a pipeline of diffusers hands to its own denoiser."""
    first = float(torch.as_tensor(timestep).flatten()[0])
    return 1000 * first if isinstance(denoiser, FluxTransformer2DModel) else first


def _gather_added(
    names: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple:
    """SDXL takes its size and pooled text in a dict of their own, PixArt its size, if any."""
    added = {name: kwargs.pop(name, None) for name in names}
    return args, {**kwargs, "added_cond_kwargs": added}


def _beside(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Mask and masked image stand behind the channels of the latent (RunwayML's inpainting)."""
    beside = kwargs.pop(BESIDE, None)
    if beside is None:
        return args, kwargs
    return (torch.cat([args[0], beside], 1), *args[1:]), kwargs


def _timestep_by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """Where the second argument is another one."""
    named = dict(zip(("timestep",), args[1:], strict=False))
    return args[:1], {**named, **kwargs}


class _Tokens:
    """What FLUX reads of an image, and the image of what it gives back.

    rows: of tokens in the image of the call that is under way.
    """

    rows = 1

    def of_image(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """Tokens [N, L, 4 C] of 2 x 2 latents, where each stands, and t from 0 to 1."""
        x, t = args
        self.rows = x.shape[2] // 2
        rows, columns = (torch.arange(side // 2, device=x.device) for side in x.shape[2:])
        grid = torch.cartesian_prod(rows, columns).to(x.dtype)
        text = kwargs["encoder_hidden_states"]
        named = {
            "timestep": t.to(x.dtype) / 1000,
            "img_ids": F.pad(grid, (1, 0)),
            "txt_ids": torch.zeros(text.shape[1], 3, dtype=x.dtype, device=x.device),
        }
        return (F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),), {**kwargs, **named}

    def as_image(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """The inverse: tokens [N, L, 4 C] to [N, C, H, W]."""
        tokens: Tensor = output.sample.transpose(1, 2)
        image = F.pixel_shuffle(tokens.unflatten(2, (self.rows, -1)), 2)
        return type(output)(sample=image)


def _without_variance(module: nn.Module, args: tuple, output: Any) -> Any:
    """Learned variances (arXiv 2102.09672) are the second half of the channels; samplers with
    few steps have no use for them."""
    return type(output)(sample=output.sample.chunk(2, dim=1)[0])
