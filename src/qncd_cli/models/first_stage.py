"""The first stage of a latent model: what makes images of latents, whole, in parts or in tiles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, NotFinite

DECODE_PIXELS = 64 * 32 * 32
"""Pixels of images that are decoded at once, at least one image: memory grows with them."""
DISTANCES = 2**21
"""Between latents and vectors of a codebook that are held at once; more would leave the cache."""
Unscaled = Callable[[Any, Tensor], Tensor]
"""(first stage's configuration, latents) -> latents as the first stage takes them."""


class InDtype(nn.Module):
    """A decoder that computes in a type of its own, between float32 ends."""

    def __init__(self, decoder: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.decoder, self.dtype = decoder, dtype

    def forward(self, x: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        result: Tensor = self.decoder(x.to(self.dtype)).float()
        return result


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float -> [0, 255] uint8, on the CPU. Raises NotFinite for what is not."""
    finite = torch.isfinite(images).flatten(1).all(1)
    if not finite.all():
        raise NotFinite(
            f"{int((~finite).sum())} of {len(images)} decoded images are not finite",
            "the latents are: are the decoder's weights sound? else lower sampling.guidance_scale",
        )
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def scaled(config: Any, latents: Tensor) -> Tensor:
    """Most pipelines; what else the first stage's configuration says is passed over, as there."""
    return latents / config.scaling_factor


@dataclass(frozen=True)
class FirstStage:
    """Makes images uint8 [N, C, H, W] of latents [N, c, h, w], computed in float32.

    model: diffusers' AutoencoderKL or VQModel, whose decoder may be another one's; unscaled: what
    the pipeline's class does to latents before it decodes them.
    """

    model: Any
    unscaled: Unscaled = scaled

    def __call__(self, latents: Tensor) -> Tensor:
        latents = self.unscaled(self.model.config, latents.to(self.model.device, torch.float32))
        parts = latents.split(self.images_at_once(latents.shape))
        model = _looked_up_by_rows(self.model)
        return torch.cat([to_uint8(model.decode(part).sample) for part in parts])

    @property
    def decoder(self) -> nn.Module:
        """What computes: all but the lookup in a codebook and a convolution of latents."""
        found: nn.Module = self.model.decoder
        return found

    @property
    def factor(self) -> int:
        """Pixels along one latent."""
        return int(2 ** (len(self.model.config.block_out_channels) - 1))

    def images_at_once(self, shape: torch.Size) -> int:
        """How many latents of a shape [N, c, h, w] are decoded together."""
        return max(1, DECODE_PIXELS // (shape[-2] * shape[-1] * self.factor**2))

    def decoded_shape(self, sides: Sequence[int]) -> tuple[int, int, int]:
        """Shape [c, h, w] of what the decoder is given of latents of these sides: the most of it is
        whole tiles, where images are decoded in tiles."""
        if getattr(self.model, "use_tiling", False):
            sides = [min(side, self.model.tile_latent_min_size) for side in sides]
        height, width = sides
        return int(self.model.config.latent_channels), height, width

    def with_decoder(self, decoder: nn.Module) -> FirstStage:
        """The same with another decoder; this one stays as it is."""
        model = copy.copy(self.model)
        model._modules = {**model._modules, "decoder": decoder}
        return replace(self, model=model)

    def tiled(self, side: int) -> FirstStage:
        """The same for images of more than `side` pixels in tiles of that side, which overlap by a
        quarter and are blended there (diffusers' `enable_tiling`).

        Raises ConfigError where the first stage decodes no tiles, or not of that side.
        """
        if not hasattr(self.model, "tile_latent_min_size"):
            raise ConfigError(
                f"first_stage.tile: diffusers' {type(self.model).__name__} decodes no tiles",
                "set first_stage.tile: null",
            )
        if side % (4 * self.factor):
            raise ConfigError(
                f"first_stage.tile: {side} pixels are no multiple of {4 * self.factor}",
                f"a tile is of whole latents of {self.factor} pixels, and so is a quarter of it",
            )
        model = copy.copy(self.model)
        model.enable_tiling()
        model.tile_sample_min_size = side
        model.tile_latent_min_size = side // self.factor
        return replace(self, model=model)


def _looked_up_by_rows(model: Any) -> Any:
    """The same first stage, which looks latents up in its codebook, if it has one, a few rows of
    one image at a time: what is nearest of two codes as near as rounding tells depends on no other
    image."""
    codebook = getattr(model, "quantize", None)
    if codebook is None:
        return model

    def forward(latents: Tensor) -> tuple[Tensor, None, None]:
        rows = max(1, DISTANCES // (latents.shape[-1] * len(codebook.embedding.weight)))
        images = latents.split(1)
        found = [torch.cat([codebook(part)[0] for part in x.split(rows, 2)], 2) for x in images]
        return torch.cat(found), None, None

    looked_up = copy.copy(codebook)
    looked_up.forward = forward
    made = copy.copy(model)
    made._modules = {**model._modules, "quantize": looked_up}
    return made
