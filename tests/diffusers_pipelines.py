"""Tiny random instances of diffusers' own pipeline classes, saved as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import ddim_scheduler

WORDS = ("a", "red", "blue", "shoe", "bag")
LETTERS = tuple("!abcdefghijklmnopqrstuvwxyz")
TOKENS = 2 * len(LETTERS) + 2


def tokenizer_in(folder: Path) -> Any:
    """CLIP's, with a vocabulary of letters: their places, and those of letters that end a word."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=9)


def text_config(width: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=TOKENS,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=9,
        bos_token_id=TOKENS - 2,
        eos_token_id=TOKENS - 1,
        pad_token_id=TOKENS - 1,
    )


def _unet(channels: int = 4, **options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **options,
    )


def _of_images(kind: str, folder: Path, channels: int = 4) -> None:
    """A pipeline that begins from images; its encoder is sure of its latents."""
    import diffusers
    from transformers import CLIPTextModel

    first_stage = _vae()
    with torch.no_grad():
        first_stage.quant_conv.bias[4:] = -60.0  # the logarithm of their variance
    getattr(diffusers, kind)(
        vae=first_stage,
        text_encoder=CLIPTextModel(text_config(16)),
        tokenizer=tokenizer_in(folder / "tokens"),
        unet=_unet(channels, cross_attention_dim=16),
        scheduler=ddim_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def image_to_image(folder: Path) -> None:
    _of_images("StableDiffusionImg2ImgPipeline", folder)


def inpainting(folder: Path) -> None:
    _of_images("StableDiffusionInpaintPipeline", folder, 9)


def refiner(folder: Path) -> None:
    """SDXL's, which has the second text encoder alone and reads a score of beauty."""
    from diffusers import StableDiffusionXLImg2ImgPipeline
    from transformers import CLIPTextModelWithProjection

    _of_xl(
        StableDiffusionXLImg2ImgPipeline,
        folder,
        24,
        5,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=CLIPTextModelWithProjection(text_config(24)),
        requires_aesthetics_score=True,
    )


def inpainting_xl(folder: Path) -> None:
    from diffusers import StableDiffusionXLInpaintPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    _of_xl(
        StableDiffusionXLInpaintPipeline,
        folder,
        16 + 24,
        6,
        9,
        text_encoder=CLIPTextModel(text_config(16)),
        tokenizer=tokenizer_in(folder / "tokens"),
        text_encoder_2=CLIPTextModelWithProjection(text_config(24)),
    )


def _of_xl(
    kind: Any, folder: Path, width: int, sizes: int, channels: int = 4, **parts: Any
) -> None:
    """sizes: numbers that are read beside the pooled text."""
    first_stage = _vae()
    with torch.no_grad():
        first_stage.quant_conv.bias[4:] = -60.0
    kind(
        vae=first_stage,
        unet=_unet(
            channels,
            cross_attention_dim=width,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=24 + sizes * 4,
            use_linear_projection=True,
        ),
        tokenizer_2=tokenizer_in(folder / "tokens"),
        scheduler=ddim_scheduler(),
        add_watermarker=False,
        **parts,
    ).save_pretrained(folder)


def _controlnet(unet: Any) -> Any:
    """With weights where diffusers begins with zeros."""
    from diffusers import ControlNetModel

    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    for module in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(module.weight, std=0.3)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.3)
    return net


def control(folder: Path) -> None:
    from diffusers import StableDiffusionControlNetPipeline
    from transformers import CLIPTextModel

    unet = _unet(cross_attention_dim=16)
    StableDiffusionControlNetPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(text_config(16)),
        tokenizer=tokenizer_in(folder / "tokens"),
        unet=unet,
        controlnet=_controlnet(unet),
        scheduler=ddim_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def control_xl(folder: Path) -> None:
    from diffusers import StableDiffusionXLControlNetPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = _unet(
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24 + 6 * 4,
        use_linear_projection=True,
    )
    tokenizer = tokenizer_in(folder / "tokens")
    StableDiffusionXLControlNetPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(text_config(16)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(24)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        controlnet=_controlnet(unet),
        scheduler=ddim_scheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)


def _vae(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        **{"latent_channels": 4, **options},
        sample_size=16,
        scaling_factor=0.5,
    )


def stable_diffusion(folder: Path, scheduler: Any = None, **schedule: Any) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(text_config(16)),
        tokenizer=tokenizer_in(folder / "tokens"),
        unet=_unet(cross_attention_dim=16),
        scheduler=scheduler or ddim_scheduler(**schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def stable_diffusion_v(folder: Path) -> None:
    """Stable Diffusion 2.x, which predicts v."""
    stable_diffusion(folder, prediction_type="v_prediction")


def few_steps(name: str, **options: Any) -> Any:
    """A scheduler of distilled models with Stable Diffusion's noise levels."""
    import diffusers

    levels = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, name)(**levels, **options)


def latent_consistency(folder: Path) -> None:
    """Reads the guidance scale."""
    from diffusers import LatentConsistencyModelPipeline
    from transformers import CLIPTextModel

    LatentConsistencyModelPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(text_config(16)),
        tokenizer=tokenizer_in(folder / "tokens"),
        unet=_unet(cross_attention_dim=16, time_cond_proj_dim=8),
        scheduler=few_steps("LCMScheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def stable_diffusion_tcd(folder: Path) -> None:
    stable_diffusion(folder, few_steps("TCDScheduler"))


def stable_diffusion_xl_lcm(folder: Path) -> None:
    stable_diffusion_xl(folder, few_steps("LCMScheduler"), time_cond_proj_dim=8)


def stable_diffusion_xl_turbo(folder: Path) -> None:
    turbo = few_steps("EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
    stable_diffusion_xl(folder, turbo)


def stable_diffusion_xl(folder: Path, scheduler: Any = None, **options: Any) -> None:
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = _unet(
        **options,
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24 + 6 * 4,
        use_linear_projection=True,
    )
    tokenizer = tokenizer_in(folder / "tokens")
    StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(text_config(16)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(24)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler or ddim_scheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)


def dit(folder: Path) -> None:
    """With learned variances, as DiT-XL/2 has them."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,  # DiTPipeline's null class is 1000 whatever the model
    )
    DiTPipeline(transformer, _vae(), ddim_scheduler()).save_pretrained(folder)


def _t5(width: int) -> tuple[Any, Any]:
    """An encoder and a tokenizer that knows WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2
    )
    return T5EncoderModel(config), tokenizer


def _pixart(folder: Path, kind: str, sample_size: int) -> None:
    import diffusers

    encoder, tokenizer = _t5(16)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=sample_size,
        patch_size=2,
        caption_channels=16,
    )
    getattr(diffusers, kind)(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=_vae(),
        transformer=transformer,
        scheduler=ddim_scheduler(),
    ).save_pretrained(folder)


def pixart_alpha(folder: Path) -> None:
    """The size of the 1024-pixel model, which takes the size of the image as well."""
    _pixart(folder, "PixArtAlphaPipeline", 128)


def pixart_sigma(folder: Path) -> None:
    _pixart(folder, "PixArtSigmaPipeline", 8)


def stable_diffusion_3(folder: Path) -> None:
    """With a block of SD3.5's that attends twice."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    encoder, tokenizer_3 = _t5(40)
    tokenizer = tokenizer_in(folder / "tokens")
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=40,
            caption_projection_dim=16,
            pooled_projection_dim=40,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(text_config(16)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config(24)),
        tokenizer_2=tokenizer,
        text_encoder_3=encoder,
        tokenizer_3=tokenizer_3,
    ).save_pretrained(folder)


def _flux(folder: Path, guidance_embeds: bool, **schedule: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    encoder, tokenizer_2 = _t5(24)
    FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 2, 2),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**schedule),
        vae=_vae(shift_factor=0.1),
        text_encoder=CLIPTextModel(text_config(16)),
        tokenizer=tokenizer_in(folder / "tokens"),
        text_encoder_2=encoder,
        tokenizer_2=tokenizer_2,
    ).save_pretrained(folder)


def flux_dev(folder: Path) -> None:
    """Reads the guidance scale; its shift depends on the size of the image."""
    _flux(folder, True, shift=3.0, use_dynamic_shifting=True)


def flux_schnell(folder: Path) -> None:
    _flux(folder, False)


def _pixel_unet(channels: int) -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )


def ddim(folder: Path) -> None:
    from diffusers import DDIMPipeline

    DDIMPipeline(_pixel_unet(3), ddim_scheduler()).save_pretrained(folder)


def ddpm(folder: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(_pixel_unet(3), DDPMScheduler()).save_pretrained(folder)


def ldm(folder: Path) -> None:
    from diffusers import LDMPipeline, VQModel

    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=16,
        sample_size=16,
    )
    LDMPipeline(vqvae, _pixel_unet(3), ddim_scheduler()).save_pretrained(folder)


def consistency(folder: Path) -> None:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    scheduler = CMStochasticIterativeScheduler()
    ConsistencyModelPipeline(_pixel_unet(3), scheduler).save_pretrained(folder)


TEXT = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionPipeline, v": stable_diffusion_v,
    "StableDiffusionXLPipeline": stable_diffusion_xl,
    "PixArtAlphaPipeline": pixart_alpha,
    "PixArtSigmaPipeline": pixart_sigma,
    "StableDiffusion3Pipeline": stable_diffusion_3,
}
FLUX = {"FluxPipeline, dev": flux_dev, "FluxPipeline, schnell": flux_schnell}
FEW_STEPS = {
    "LatentConsistencyModelPipeline": latent_consistency,
    "StableDiffusionPipeline, TCD": stable_diffusion_tcd,
    "StableDiffusionXLPipeline, LCM": stable_diffusion_xl_lcm,
    "StableDiffusionXLPipeline, Turbo": stable_diffusion_xl_turbo,
}
IMAGES = {
    "StableDiffusionImg2ImgPipeline": image_to_image,
    "StableDiffusionInpaintPipeline": inpainting,
    "StableDiffusionXLImg2ImgPipeline": refiner,
    "StableDiffusionXLInpaintPipeline": inpainting_xl,
}
CONTROL = {
    "StableDiffusionControlNetPipeline": control,
    "StableDiffusionXLControlNetPipeline": control_xl,
}
CLASSES = {"DiTPipeline": dit}
UNCONDITIONAL = {"DDIMPipeline": ddim, "DDPMPipeline": ddpm, "LDMPipeline": ldm}
CONSISTENCY = {"ConsistencyModelPipeline": consistency}


def save(name: str, folder: Path) -> Path:
    """The same weights every time."""
    torch.manual_seed(0)
    {**TEXT, **FLUX, **FEW_STEPS, **IMAGES, **CONTROL, **CLASSES, **UNCONDITIONAL, **CONSISTENCY}[
        name
    ](folder)
    return folder
