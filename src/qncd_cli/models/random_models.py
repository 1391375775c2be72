"""Full-size architectures with random weights: for time, memory and size, never for images.

| name | shapes of | parameters of the denoiser |
|---|---|---|
| ldm4 | LDM-4 ImageNet (cin256-v2) | 400.9 M |
| sd15 | Stable Diffusion 1.x at 512 x 512 | 859.5 M |
| dit-xl | DiT-XL/2 at 256 x 256 (arXiv 2212.09748), without its variance | 749.8 M |

sd15 has no text encoder: its "classes" are PROMPTS random embeddings of 77 tokens, and the null
class stands for the empty prompt. What the denoiser computes is that of a prompt. dit-xl has more
than the 675 M of the paper because diffusers gives every block embeddings of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    VQModel,
)

from ..errors import ModelError
from .digest import RANDOM_SEED
from .pipelines import ClassConditionalDiTPipeline, ClassConditionalLDMPipeline, ClassEmbedder

PROMPTS = 16


def _ldm4() -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(192, 384, 576, 960),
        layers_per_block=2,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        cross_attention_dim=512,
        attention_head_dim=1,  # diffusers takes it for the number of heads
    )
    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(128, 256, 512),
        layers_per_block=2,
        latent_channels=3,
        vq_embed_dim=3,
        num_vq_embeddings=8192,
        sample_size=256,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return ClassConditionalLDMPipeline(unet, vqvae, ClassEmbedder(1000, 512), scheduler)


def _sd15() -> DiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=768,
        attention_head_dim=8,  # diffusers takes it for the number of heads
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    prompts = ClassEmbedder(PROMPTS, 768, tokens=77)
    return ClassConditionalLDMPipeline(unet, kl_autoencoder(512), prompts, scheduler)


def _dit_xl() -> DiffusionPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=4,
        num_layers=28,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, set_alpha_to_one=True)
    return ClassConditionalDiTPipeline(transformer, kl_autoencoder(256), scheduler)


def kl_autoencoder(sample_size: int, channels: int = 4) -> AutoencoderKL:
    """Stable Diffusion's first stage at an eighth, which DiT and SDXL share; 16 channels: SD3's."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
        sample_size=sample_size,
        scaling_factor=0.18215,
    )


RANDOM: dict[str, Callable[[], DiffusionPipeline]] = {
    "ldm4": _ldm4,
    "sd15": _sd15,
    "dit-xl": _dit_xl,
}


def random_pipeline(name: str) -> DiffusionPipeline:
    """The named architecture, the same weights every time. Raises ModelError."""
    if name not in RANDOM:
        close = difflib.get_close_matches(name, RANDOM, n=1)
        hint = f"did you mean random:{close[0]}?" if close else f"known: {', '.join(RANDOM)}"
        raise ModelError(f"no architecture random:{name}", hint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        return RANDOM[name]()
