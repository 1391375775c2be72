"""Architectures of published models whose weights are not here: for plans alone.

Each function makes the modules; the caller chooses the device (meta). Source: the configurations
beside the published weights.
"""

from __future__ import annotations

from collections.abc import Callable

from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from ..models.random_models import kl_autoencoder


def _sdxl() -> dict[str, nn.Module]:
    """stabilityai/stable-diffusion-xl-base-1.0, 1024 x 1024 (arXiv 2307.01952)."""
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return {"unet": unet, "vae": kl_autoencoder(1024)}


def _pixart_sigma() -> dict[str, nn.Module]:
    """PixArt-alpha/PixArt-Sigma-XL-2-1024-MS (arXiv 2403.04692)."""
    transformer = PixArtTransformer2DModel(
        sample_size=128,
        out_channels=8,
        num_layers=28,
        interpolation_scale=2,
        caption_channels=4096,
        use_additional_conditions=False,
    )
    return {"transformer": transformer, "vae": kl_autoencoder(1024)}


def _sd3_medium() -> dict[str, nn.Module]:
    """stabilityai/stable-diffusion-3-medium, 1024 x 1024 (arXiv 2403.03206)."""
    transformer = SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        out_channels=16,
        pos_embed_max_size=192,
    )
    return {"transformer": transformer, "vae": kl_autoencoder(1024, 16)}


def _flux_dev() -> dict[str, nn.Module]:
    """black-forest-labs/FLUX.1-dev: 19 double and 38 single blocks, 24 heads of 128."""
    return {
        "transformer": FluxTransformer2DModel(guidance_embeds=True),
        "vae": kl_autoencoder(1024, 16),
    }


PUBLISHED: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "sdxl": _sdxl,
    "pixart-sigma": _pixart_sigma,
    "sd3": _sd3_medium,
    "flux-dev": _flux_dev,
}
