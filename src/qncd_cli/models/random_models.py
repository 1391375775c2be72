"""Full-size architectures with random weights: for time, memory and size, never for images.

random:ldm4 has the shapes of LDM-4 ImageNet (cin256-v2; method.md section 7): 400.9 M parameters.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel, VQModel

from ..errors import ModelError
from .pipelines import ClassConditionalLDMPipeline, ClassEmbedder

SEED = 0


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


RANDOM: dict[str, Callable[[], DiffusionPipeline]] = {"ldm4": _ldm4}


def random_pipeline(name: str) -> DiffusionPipeline:
    """The named architecture, the same weights every time. Raises ModelError."""
    if name not in RANDOM:
        close = difflib.get_close_matches(name, RANDOM, n=1)
        hint = f"did you mean random:{close[0]}?" if close else f"known: {', '.join(RANDOM)}"
        raise ModelError(f"no architecture random:{name}", hint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return RANDOM[name]()
