"""What each class of denoiser is called with, as tensors on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor

from ..errors import ModelError
from ..models.control import CONTROL, CONTROLNET

Arguments = dict[str, Any]
Latent = tuple[int, ...]
TEXT_TOKENS = {
    "UNet2DConditionModel": 77,
    "PixArtTransformer2DModel": 300,
    "SD3Transformer2DModel": 77 + 256,
    "FluxTransformer2DModel": 512,
}
"""Tokens of a prompt as the pipelines encode it, by class of the denoiser."""
PIXART_ALPHA_TOKENS = 120
T5_TOKENS = 256
CLIP_PIPELINES = {
    "StableDiffusionPipeline": 0,
    "StableDiffusionXLPipeline": 0,
    "LatentConsistencyModelPipeline": 0,
    "StableDiffusionImg2ImgPipeline": 0,
    "StableDiffusionInpaintPipeline": 0,
    "StableDiffusionXLImg2ImgPipeline": 0,
    "StableDiffusionXLInpaintPipeline": 0,
    "StableDiffusionControlNetPipeline": 0,
    "StableDiffusionXLControlNetPipeline": 0,
    "StableDiffusion3Pipeline": T5_TOKENS,
}
"""Pipelines whose prompts are as long as their first encoder reads -> T5's tokens after them."""
FLUX_TOKENS = 64 * 64
"""Latents of a 1024 x 1024 image at an eighth, packed two by two."""


def arguments_of(
    denoiser: Any, dtype: torch.dtype, latent: Latent, tokens: int, scaled: bool = False
) -> Callable[[int], Arguments]:
    """Function of the number of rows that makes a denoiser's arguments on the meta device.

    latent: shape of one; tokens: of a prompt; scaled: whether a U-Net is given the guidance scale.
    Raises ModelError for an unknown class.
    """
    kind = next((k for k in _ARGUMENTS if isinstance(denoiser, k)), None)
    if kind is None:
        known = ", ".join(k.__name__ for k in _ARGUMENTS)
        raise ModelError(f"no plan for a {type(denoiser).__name__}", f"known: {known}")

    def arguments(rows: int) -> Arguments:
        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=of, device="meta")

        common = {"hidden_states": zeros(rows, *latent), "timestep": zeros(rows)}
        return common | _ARGUMENTS[kind](denoiser, zeros, rows, tokens, latent)

    if kind in (UNet2DConditionModel, UNet2DModel):

        def of_unet(rows: int) -> Arguments:
            found = arguments(rows)
            del found["hidden_states"]
            shape = rows, denoiser.config.in_channels, *latent[1:]
            found["sample"] = torch.zeros(shape, dtype=dtype, device="meta")
            if scaled:
                width = denoiser.config.time_cond_proj_dim
                found["timestep_cond"] = torch.zeros(rows, width, dtype=dtype, device="meta")
            return found

        return of_unet
    return arguments


def _unet(denoiser: Any, zeros: Any, rows: int, tokens: int, latent: Latent) -> Arguments:
    config = denoiser.config
    found = {"encoder_hidden_states": zeros(rows, tokens, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        ids = 6 * config.addition_time_embed_dim
        pooled = zeros(rows, config.projection_class_embeddings_input_dim - ids)
        found["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": zeros(rows, 6)}
    if hasattr(denoiser, CONTROLNET):  # as large as the image
        factor = 2 ** (len(denoiser.controlnet.config.conditioning_embedding_out_channels) - 1)
        found[CONTROL] = zeros(rows, 3, factor * latent[1], factor * latent[2])
    return found


def _class_labels(denoiser: Any, zeros: Any, rows: int, tokens: int, latent: Latent) -> Arguments:
    config = denoiser.config
    labelled = getattr(config, "num_class_embeds", None) or hasattr(config, "num_embeds_ada_norm")
    return {"class_labels": zeros(rows, of=torch.int64)} if labelled else {}


def _pixart(denoiser: Any, zeros: Any, rows: int, tokens: int, latent: Latent) -> Arguments:
    added = {"resolution": None, "aspect_ratio": None}
    if denoiser.use_additional_conditions:
        added = {"resolution": zeros(rows, 2), "aspect_ratio": zeros(rows, 1)}
    return {
        "encoder_hidden_states": zeros(rows, tokens, denoiser.config.caption_channels),
        "encoder_attention_mask": zeros(rows, tokens),
        "added_cond_kwargs": added,
    }


def _sd3(denoiser: Any, zeros: Any, rows: int, tokens: int, latent: Latent) -> Arguments:
    config = denoiser.config
    return {
        "encoder_hidden_states": zeros(rows, tokens, config.joint_attention_dim),
        "pooled_projections": zeros(rows, config.pooled_projection_dim),
    }


def _flux(denoiser: Any, zeros: Any, rows: int, tokens: int, latent: Latent) -> Arguments:
    config, image = denoiser.config, latent[1] * latent[2] // 4
    return {
        **_sd3(denoiser, zeros, rows, tokens, latent),
        "hidden_states": zeros(rows, image, config.in_channels),
        "img_ids": zeros(image, 3),
        "txt_ids": zeros(tokens, 3),
        "guidance": zeros(rows) if config.guidance_embeds else None,
    }


_ARGUMENTS: dict[type, Callable[[Any, Any, int, int, Latent], Arguments]] = {
    UNet2DConditionModel: _unet,
    UNet2DModel: _class_labels,
    DiTTransformer2DModel: _class_labels,
    PixArtTransformer2DModel: _pixart,
    SD3Transformer2DModel: _sd3,
    FluxTransformer2DModel: _flux,
}
