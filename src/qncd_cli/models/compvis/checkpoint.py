"""CompVis latent-diffusion checkpoints -> diffusers pipelines. Strict: no tensor is guessed.

Every tensor of the file is either used, or listed in what is known to be unused, or an error; so
is every parameter of the modules that the file has nothing for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from torch import Tensor, nn

from ...errors import ModelError
from ..pipelines import ClassConditionalLDMPipeline, ClassEmbedder
from ..unets import MultiHeadUNet2DModel
from .config import (
    class_embedder_options,
    first_stage_options,
    read_yaml,
    schedule_options,
    unet_options,
)
from .file import read_tensors, some_tensors
from .keys import (
    COND_STAGE,
    EMA,
    FIRST_STAGE,
    UNET,
    Source,
    ema_key,
    first_stage_sources,
    unet_sources,
)
from .text import TextEncoder, TextOptions, load_tokenizer, text_encoder, text_options

# Of the training, or computed from the schedule; `betas` and `scale_factor` are read.
NOT_WEIGHTS = {
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
    "cond_ids",
    f"{EMA}decay",
    f"{EMA}num_updates",
}
_UNUSED_BELOW = (f"{FIRST_STAGE}loss.",)
BETAS_TOLERANCE = 1e-3  # relative; a checkpoint in half precision has them in that


@dataclass
class _Conversion:
    """Tensors of one checkpoint on their way into modules, and what is wrong with them."""

    tensors: dict[str, Tensor]
    used: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)

    def fill(self, module: nn.Module, sources: dict[str, Source]) -> None:
        """Give a module on the meta device the checkpoint's tensors, in their stored precision."""
        state = {}
        for name, wanted in module.state_dict().items():
            source = sources[name]
            self.used.add(source.key)
            tensor = self.tensors.get(source.key)
            if tensor is None:
                self.missing.append(source.key)
                continue
            shape = list(wanted.shape)
            if source.part is not None:
                shape[0] *= 3
            # a convolution of size 1 may stand for a linear layer
            stored, ones = list(tensor.shape[: len(shape)]), tensor.shape[len(shape) :]
            if stored != shape or any(n != 1 for n in ones):
                self.misshaped.append(f"{source.key} is {list(tensor.shape)}, expected {shape}")
                continue
            if source.part is not None:  # [heads * 3 * d, ...]: q, k, v of the first head, ...
                attention: Any = module.get_submodule(name.rpartition(".to_")[0])
                heads = 1 if source.stacked else attention.heads
                tensor = tensor.reshape(heads, 3, -1)[:, source.part]
            state[name] = tensor.reshape(wanted.shape)
        if not self.missing and not self.misshaped:
            module.load_state_dict(state, assign=True)

    def take(self, key: str) -> Tensor:
        self.used.add(key)
        return self.tensors[key]

    def check(self, file: str, unused: set[str]) -> None:
        """Raises ModelError that names the first offenders of each kind and counts them."""
        known = self.used | NOT_WEIGHTS | unused
        unknown = [k for k in self.tensors if k not in known and not k.startswith(_UNUSED_BELOW)]
        wrong = [
            some_tensors("missing", list(dict.fromkeys(self.missing))),
            some_tensors("of another shape", list(dict.fromkeys(self.misshaped))),
            some_tensors("not known", unknown),
        ]
        if any(wrong):
            raise ModelError(
                f"{file}: does not fit its YAML: {'; '.join(w for w in wrong if w)}",
                "is model.compvis_config the YAML of this checkpoint?",
            )


def compvis_pipeline(
    checkpoint: str, config: str | None, tokenizer: str | None = None
) -> DiffusionPipeline:
    """The pipeline that a checkpoint and its YAML describe, in the stored precision.

    The U-Net's moving averages (EMA) are taken where the checkpoint has them. Latents are
    multiplied by the checkpoint's scale_factor if it has one, else by the YAML's. tokenizer: a
    folder or hub id, of models that read text alone. Raises ModelError.
    """
    if not os.path.isfile(checkpoint):
        raise ModelError(f"{checkpoint}: no such file", "check model.source")
    yaml = _needed(checkpoint, config)
    parts = _Parts.described(yaml)
    if tokenizer is not None and parts.text is None:
        raise ModelError(f"{checkpoint}: reads no text", "leave model.tokenizer out")
    words = None if parts.text is None else load_tokenizer(checkpoint, parts.text, tokenizer)
    conversion = _Conversion(read_tensors(checkpoint))
    text = None
    if parts.text is not None:
        text = text_encoder(checkpoint, conversion.tensors, parts.text, words)
        _check_context(yaml, parts.unet, text.module.config.hidden_size)
    unused = _fill(parts, conversion, text)
    if "betas" in conversion.tensors:
        _check_betas(checkpoint, conversion.take("betas"), parts.scheduler)
    if "scale_factor" in conversion.tensors:
        factor = _one_number(checkpoint, conversion.take("scale_factor"))
        parts.first_stage.register_to_config(scaling_factor=factor)
    conversion.check(checkpoint, unused)
    if text is not None:
        return StableDiffusionPipeline(
            vae=parts.first_stage,
            text_encoder=text.module.eval(),
            tokenizer=text.tokenizer,
            unet=parts.unet,
            scheduler=parts.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if parts.embedder is None:
        return LDMPipeline(parts.first_stage, parts.unet, parts.scheduler)
    return ClassConditionalLDMPipeline(
        parts.unet, parts.first_stage, parts.embedder, parts.scheduler
    )


def described_modules(
    checkpoint: str, config: str | None
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The pipeline's modules on the meta device, by name, and the scheduler's configuration.

    From the YAML alone; the checkpoint need not be there. Raises ModelError.
    """
    parts = _Parts.described(_needed(checkpoint, config))
    modules = {"unet": parts.unet, "vqvae": parts.first_stage, "class_embedder": parts.embedder}
    return {n: m for n, m in modules.items() if m is not None}, dict(parts.scheduler.config)


def _needed(checkpoint: str, config: str | None) -> str:
    if config is None:
        raise ModelError(
            f"{checkpoint}: a checkpoint file needs a pipeline folder of the same kind, or the "
            "YAML that came with it",
            "set model.base (qncd convert: --base) or model.compvis_config (--compvis-config)",
        )
    return config


@dataclass(frozen=True)
class _Parts:
    """Components of a pipeline; modules are on the meta device until they are filled."""

    unet: Any
    first_stage: Any
    embedder: ClassEmbedder | None
    text: TextOptions | None
    scheduler: DDIMScheduler

    @classmethod
    def described(cls, config: str) -> _Parts:
        """Components that a YAML describes, on the meta device. Raises ModelError."""
        params = read_yaml(config)
        unet, stage = unet_options(params), first_stage_options(params)
        text = text_options(params)
        embedder = class_embedder_options(params) if text is None else None
        scheduler = DDIMScheduler(**schedule_options(params))
        _check_channels(config, unet, stage)
        try:
            with torch.device("meta"):
                parts = cls(
                    unet_class(unet)(**unet),
                    (VQModel if "num_vq_embeddings" in stage else AutoencoderKL)(**stage),
                    None if embedder is None else ClassEmbedder(**embedder),
                    text,
                    scheduler,
                )
        except ValueError as error:  # as channels that their number of groups does not divide
            raise ModelError(f"{config}: describes no model that can be built ({error})") from error
        if text is None:
            _check_context(config, parts.unet, None if embedder is None else embedder["embed_dim"])
        return parts


def _fill(parts: _Parts, conversion: _Conversion, text: TextEncoder | None) -> set[str]:
    """Give the modules their tensors; returns the names of those that are not needed then."""
    unused: set[str] = set()
    sources = unet_sources(parts.unet.state_dict(), parts.unet.config.layers_per_block)
    plain = {name: Source(UNET + s.key, s.part) for name, s in sources.items()}
    averaged = {name: Source(ema_key(s.key), s.part) for name, s in sources.items()}
    if any(key.startswith(ema_key("")) for key in conversion.tensors):
        conversion.fill(parts.unet, averaged)
        unused |= {s.key for s in plain.values()}
    else:
        conversion.fill(parts.unet, plain)
    levels = len(parts.first_stage.config.block_out_channels)
    sources = first_stage_sources(parts.first_stage.state_dict(), levels)
    conversion.fill(
        parts.first_stage, {name: Source(FIRST_STAGE + s.key) for name, s in sources.items()}
    )
    if text is not None:
        conversion.fill(text.module, text.sources)
        return unused | text.unused
    if parts.embedder is None:
        return unused | {key for key in conversion.tensors if key.startswith(COND_STAGE)}
    names = parts.embedder.state_dict()
    conversion.fill(parts.embedder, {name: Source(COND_STAGE + name) for name in names})
    return unused


def unet_class(config: dict[str, Any]) -> type[nn.Module]:
    """Class of the U-Net that unet_options describe."""
    if "cross_attention_dim" in config:
        return UNet2DConditionModel
    return MultiHeadUNet2DModel if "num_heads" in config else UNet2DModel


def _check_channels(file: str, unet: dict[str, Any], stage: dict[str, Any]) -> None:
    """Raises ModelError for a denoiser that does not fit the first stage."""
    latent = stage.get("vq_embed_dim", stage["latent_channels"])
    if {unet["in_channels"], unet["out_channels"]} != {latent}:
        raise ModelError(
            f"{file}: the U-Net reads {unet['in_channels']} and writes {unet['out_channels']}"
            f" channels, the first stage has {latent}",
            "models conditioned by concatenation are not supported",
        )


def _check_context(file: str, unet: Any, width: int | None) -> None:
    """width: of what cond_stage_config gives the U-Net; None: nothing. Raises ModelError."""
    context = unet.config.get("cross_attention_dim")
    if context != width:
        raise ModelError(
            f"{file}: context_dim {context} of the U-Net is not the width of cond_stage_config,"
            f" which is {width}",
            "models conditioned in another way than by cross-attention are not supported",
        )


def _check_betas(file: str, betas: Tensor, scheduler: DDIMScheduler) -> None:
    ours: Tensor = scheduler.betas
    if betas.shape != ours.shape or not torch.allclose(
        betas.float(), ours, rtol=BETAS_TOLERANCE, atol=0.0
    ):
        raise ModelError(
            f"{file}: its noise schedule (betas) is not the YAML's",
            "is model.compvis_config the YAML of this checkpoint?",
        )


def _one_number(file: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not torch.isfinite(tensor).all() or float(tensor) <= 0:
        raise ModelError(f"{file}: scale_factor is not one positive number", "is it complete?")
    return float(tensor)
