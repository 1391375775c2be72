"""Text-to-image pipelines: a prompt is to them what a class is to the others.

Every prompt is encoded once and kept (`prompt_cache`); the labels of samples are indices into the
list of prompts, and the negative prompt is the null class of classifier-free guidance. The text
encoders are freed afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..progress import Track, counted, no_progress
from .control import ControlImages
from .image_size import Sides
from .image_size import latent_sides as sides_for
from .prompt_length import Tell, check_lengths
from .start_images import StartImages

ENCODED_AT_ONCE = 16
AESTHETIC_SCORES = (6.0, 2.5)
"""What SDXL's refiner is told of prompt and negative prompt: its pipeline's defaults."""
Table = dict[str, Tensor]


@dataclass(frozen=True)
class Prompts:
    """texts: taken in turn by seed; negative: what guidance leads away from.

    image_size: height and width in pixels, one number where they are equal, None for the model's
    own; guidance_scale: for models that read it; images: that sampling begins from;
    control: that a ControlNet reads.
    """

    texts: tuple[str, ...]
    negative: str = ""
    image_size: int | Sides | None = None
    guidance_scale: float = 1.0
    images: StartImages | None = None
    control: ControlImages | None = None


@dataclass(frozen=True)
class Encoded:
    """What prompts become: arguments of the denoiser, whatever the size of images.

    table: each [P, ...], a row a prompt; negative: each [1, ...], None for models without guidance.
    """

    table: Table
    negative: Table | None


def latent_sides(pipeline: Any, prompts: Prompts) -> Sides:
    """Height and width of latents. Raises ModelError for an image size that the model cannot have.

    The model's own size is one number, or a pair where its images are not square.
    """
    denoiser = _denoiser(pipeline)
    if prompts.image_size is None:
        own = getattr(denoiser.config, "sample_size", None)
        sides = own or pipeline.default_sample_size
        height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
        return int(height), int(width)
    name, factor = type(pipeline).__name__, pipeline.vae_scale_factor
    return sides_for(name, denoiser, factor, prompts.image_size)


@torch.no_grad()
def told_size(pipeline: Any, prompts: Prompts, encoded: Encoded) -> tuple[Table, Table]:
    """What a denoiser reads of the image's size, each [1, ...]: with a prompt, and without.

    SDXL: time_ids, original height and width, top and left of the crop, height and width of the
    image (arXiv 2307.01952, sec. 2.2): the size that is drawn, uncropped; of a refiner a score of
    beauty for the last two. The 1024-pixel models of PixArt-alpha: resolution and aspect_ratio
    (arXiv 2310.00426, sec. 2.4). Others read nothing.
    """
    like = encoded.table["encoder_hidden_states"]
    height, width = (pipeline.vae_scale_factor * n for n in latent_sides(pipeline, prompts))

    def row(*numbers: float) -> Tensor:
        return torch.tensor([numbers], dtype=like.dtype, device=like.device)

    kind = type(pipeline).__name__
    if TEXT_TABLES[kind] is stable_diffusion_xl_table:
        scored = pipeline.config.get("requires_aesthetics_score", False)
        ids = [
            row(height, width, 0, 0, *((score,) if scored else (height, width)))
            for score in AESTHETIC_SCORES
        ]
        return {"time_ids": ids[0]}, {"time_ids": ids[1]}
    if kind == "PixArtAlphaPipeline" and pipeline.transformer.config.sample_size == 128:
        size = row(height, width)
        found = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        return found, found
    return {}, {}


def reads_scale(denoiser: Any) -> bool:
    """Whether a U-Net was distilled to read the guidance scale (2210.03142; LCM, 2310.04378)."""
    return getattr(denoiser.config, "time_cond_proj_dim", None) is not None


def _denoiser(pipeline: Any) -> Any:
    return pipeline.components.get("transformer") or pipeline.unet


def stable_diffusion_table(pipeline: Any, prompts: Prompts, track: Track) -> Encoded:
    """Stable Diffusion 1.x and 2.x: encoder_hidden_states [P, L, C], and [1, L, C] negative."""

    def encode(texts: list[str]) -> Table:
        embeddings, _ = pipeline.encode_prompt(texts, pipeline.unet.device, 1, False)
        return {"encoder_hidden_states": embeddings}

    return Encoded(_in_parts(encode, prompts.texts, track), encode([prompts.negative]))


def stable_diffusion_xl_table(pipeline: Any, prompts: Prompts, track: Track) -> Encoded:
    """SDXL: text_embeds [P, C'] as well. Without a negative prompt its embeddings are zeros where
    the pipeline was trained so."""
    device = pipeline.unet.device

    def encode(texts: list[str]) -> Table:
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            texts, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings, "text_embeds": pooled}

    negative = encode([prompts.negative])
    if not prompts.negative and pipeline.config.force_zeros_for_empty_prompt:
        zeros = ("encoder_hidden_states", "text_embeds")
        negative |= {name: torch.zeros_like(negative[name]) for name in zeros}
    return Encoded(_in_parts(encode, prompts.texts, track), negative)


def pixart_table(pipeline: Any, prompts: Prompts, track: Track) -> Encoded:
    """PixArt-alpha and -Sigma: T5's encoder_hidden_states [P, L, C] and their mask [P, L]."""
    device = pipeline.transformer.device

    def encode(texts: list[str]) -> Table:
        embeddings, mask, _, _ = pipeline.encode_prompt(
            texts,
            do_classifier_free_guidance=False,
            device=device,
            clean_caption=True,  # as the pipelines do, where beautifulsoup4 is installed
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    return Encoded(_in_parts(encode, prompts.texts, track), encode([prompts.negative]))


def stable_diffusion_3_table(pipeline: Any, prompts: Prompts, track: Track) -> Encoded:
    """SD3 and 3.5: encoder_hidden_states [P, L, C] of CLIP and T5, pooled_projections [P, C']."""

    def encode(texts: list[str]) -> Table:
        embeddings, _, pooled, _ = pipeline.encode_prompt(
            texts, None, None, pipeline.transformer.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    return Encoded(_in_parts(encode, prompts.texts, track), encode([prompts.negative]))


def flux_table(pipeline: Any, prompts: Prompts, track: Track) -> Encoded:
    """FLUX: T5's encoder_hidden_states [P, L, C], CLIP's pooled_projections [P, C']."""
    if prompts.negative:
        raise ModelError(
            "FluxPipeline is guided without a negative prompt", "leave negative_prompt out"
        )

    def encode(texts: list[str]) -> Table:
        embeddings, pooled, _ = pipeline.encode_prompt(texts, None, pipeline.transformer.device)
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    return Encoded(_in_parts(encode, prompts.texts, track), None)


def _in_parts(encode: Any, texts: tuple[str, ...], track: Track) -> Table:
    starts = range(0, len(texts), ENCODED_AT_ONCE)
    parts = []
    for start, tick in counted(track, starts, "encoding prompts", len(texts), "prompts"):
        some = list(texts[start : start + ENCODED_AT_ONCE])
        parts.append(encode(some))
        for _ in some:
            tick()
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def check_encoded(encoded: Encoded, source: str) -> None:
    """Raise ModelError where a prompt became something that is not finite, as T5 in float16."""
    for name, table in encoded.table.items():
        for number, row in enumerate(table):
            if not torch.isfinite(row).all():
                raise ModelError(
                    f"{source}: prompt {number} is encoded into {name} that is not finite",
                    "set model.dtype: bfloat16 or float32"
                    if table.dtype == torch.float16
                    else "are the text encoders' weights sound?",
                )
    for name, table in (encoded.negative or {}).items():
        if not torch.isfinite(table).all():
            raise ModelError(
                f"{source}: the negative prompt is encoded into {name} that is not finite",
                "set model.dtype: float32",
            )


TEXT_TABLES = {
    "StableDiffusionPipeline": stable_diffusion_table,
    "StableDiffusionXLPipeline": stable_diffusion_xl_table,
    "LatentConsistencyModelPipeline": stable_diffusion_table,
    "StableDiffusionImg2ImgPipeline": stable_diffusion_table,
    "StableDiffusionInpaintPipeline": stable_diffusion_table,
    "StableDiffusionXLImg2ImgPipeline": stable_diffusion_xl_table,
    "StableDiffusionXLInpaintPipeline": stable_diffusion_xl_table,
    "StableDiffusionControlNetPipeline": stable_diffusion_table,
    "StableDiffusionXLControlNetPipeline": stable_diffusion_xl_table,
    "PixArtAlphaPipeline": pixart_table,
    "PixArtSigmaPipeline": pixart_table,
    "StableDiffusion3Pipeline": stable_diffusion_3_table,
    "FluxPipeline": flux_table,
}
"""Pipeline class: what encodes its prompts, with gradients off."""


@torch.no_grad()
def encode(pipeline: Any, prompts: Prompts, tell: Tell, track: Track = no_progress) -> Encoded:
    """Encode prompts with the pipeline's own encoders. tell: hears of prompts that are cut.

    Raises ModelError, and ConfigError for prompts that become the same by being cut.
    """
    check_lengths(pipeline, prompts.texts, prompts.negative, tell)
    return TEXT_TABLES[type(pipeline).__name__](pipeline, prompts, track)
