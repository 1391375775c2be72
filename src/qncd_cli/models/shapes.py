"""From a model source to a denoiser and a first stage without weights, on the meta device.

Read are configurations and the headers of weights, so that it takes seconds whatever the size.
PUBLISHED: shapes of models that only a plan can take, random:NAME like the others.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import ModelError
from .compvis import described_modules
from .compvis_file import is_checkpoint
from .random_models import RANDOM
from .zoo import zoo_path

Arguments = dict[str, Any]
FIRST_STAGES = ("vqvae", "vae")
DENOISERS = ("unet", "transformer")
TEXT_TOKENS = {
    "UNet2DConditionModel": 77,
    "PixArtTransformer2DModel": 300,
    "SD3Transformer2DModel": 77 + 256,
    "FluxTransformer2DModel": 512,
}
"""Of a prompt, as the pipelines encode it; PixArt-alpha takes 120."""
FLUX_TOKENS = 64 * 64
"""Latents of a 1024 x 1024 image at an eighth, packed two by two."""


@dataclass(frozen=True)
class Part:
    """A component: parameters; stored: bytes on disk, 0 for weights drawn at random; stays: while
    the stages run (text encoders are let go)."""

    parameters: int
    stored: int
    stays: bool


@dataclass(frozen=True)
class Shapes:
    """A diffusion model without its weights.

    arguments: rows -> keyword arguments of the denoiser, tensors on the meta device. classes: of
    the model, 0 for none; guided: whether it has a null class or prompt. image_shape: of one image.
    scheduler: configuration, None where nothing says.
    """

    source: str
    denoiser: nn.Module
    first_stage: Any
    parts: dict[str, Part]
    latent_shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    classes: int
    guided: bool
    scheduler: dict[str, Any] | None
    arguments: Callable[[int], Arguments] = field(repr=False)

    def call(self, rows: int, denoiser: nn.Module | None = None) -> Tensor:
        """One call of the denoiser, or of another one in its place."""
        return (denoiser or self.denoiser)(**self.arguments(rows)).sample

    def decode(self, rows: int) -> Tensor:
        """Images of so many latents; the first stage computes in float32."""
        latents = torch.empty(rows, *self.latent_shape, device="meta")
        return latents if self.first_stage is None else self.first_stage.decode(latents).sample


def model_shapes(
    source: str, dtype: torch.dtype, *, compvis_config: str | None = None, prompts: int = 0
) -> Shapes:
    """dtype: of the denoiser; prompts: how many of a text model.

    Hub ids only where the files are here already, checkpoints from their YAML alone. Raises
    ModelError.
    """
    scheduler: dict[str, Any] | None = None
    stored: dict[str, int] = {}
    unbuilt: dict[str, int] = {}
    if source.startswith("random:"):
        modules = _random(source.removeprefix("random:"))
    elif is_checkpoint(source):
        modules, scheduler = described_modules(source, compvis_config)
        stored = {name: 4 * _parameters(module) for name, module in modules.items()}
    else:
        modules, scheduler, stored, unbuilt = _folder(_find(source), source)
    name = next((n for n in DENOISERS if n in modules), None)
    if name is None:
        raise ModelError(f"{source}: has no {' or '.join(DENOISERS)}", "is it a diffusion model?")
    denoiser = modules[name].to(dtype).eval().requires_grad_(False)
    first_stage = next((modules[n] for n in FIRST_STAGES if n in modules), None)
    parts = {n: Part(_parameters(m), stored.get(n, 0), True) for n, m in modules.items()}
    parts |= {n: Part(count, stored[n], False) for n, count in unbuilt.items()}
    latent, image = _sizes(denoiser, first_stage)
    embedder = modules.get("class_embedder")
    classes = _classes(denoiser, embedder)
    text = not classes and not isinstance(denoiser, UNet2DModel)
    distilled = getattr(denoiser.config, "guidance_embeds", False)
    return Shapes(
        source=source,
        denoiser=denoiser,
        first_stage=None if first_stage is None else first_stage.eval().requires_grad_(False),
        parts=parts,
        latent_shape=latent,
        image_shape=image,
        classes=max(1, prompts) if text else classes,
        guided=bool(classes or text) and not distilled,
        scheduler=scheduler,
        arguments=_arguments(denoiser, dtype, latent, _tokens(denoiser, embedder, source)),
    )


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _sizes(denoiser: Any, first_stage: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    config = denoiser.config
    if isinstance(denoiser, FluxTransformer2DModel):
        side = 2 * math.isqrt(FLUX_TOKENS)
        latent: tuple[int, ...] = (config.in_channels // 4, side, side)
    else:
        sides = config.sample_size
        height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
        latent = (config.in_channels, height, width)
    if first_stage is None:
        return latent, latent
    scale = 2 ** (len(first_stage.config.block_out_channels) - 1)
    return latent, (first_stage.config.out_channels, scale * latent[1], scale * latent[2])


def _classes(denoiser: Any, embedder: Any) -> int:
    if embedder is not None:
        return embedder.config.num_classes
    if isinstance(denoiser, DiTTransformer2DModel):
        return denoiser.config.num_embeds_ada_norm
    if isinstance(denoiser, UNet2DModel) and denoiser.config.num_class_embeds:
        return denoiser.config.num_class_embeds - 1
    return 0


def _tokens(denoiser: Any, embedder: Any, source: str) -> int:
    if embedder is not None:
        return embedder.config.tokens
    config = Path(source) / "text_encoder" / "config.json"
    if isinstance(denoiser, UNet2DConditionModel) and config.is_file():
        return json.loads(config.read_text(encoding="utf-8"))["max_position_embeddings"]
    if isinstance(denoiser, PixArtTransformer2DModel) and denoiser.use_additional_conditions:
        return 120
    return TEXT_TOKENS.get(type(denoiser).__name__, 0)


# ------------------------------------------------------------------ what a denoiser is called with


def _arguments(
    denoiser: Any, dtype: torch.dtype, latent: tuple[int, ...], tokens: int
) -> Callable[[int], Arguments]:
    """By the denoiser's class. Raises ModelError for one that is not known here."""
    kind = next((k for k in _ARGUMENTS if isinstance(denoiser, k)), None)
    if kind is None:
        known = ", ".join(k.__name__ for k in _ARGUMENTS)
        raise ModelError(f"no plan for a {type(denoiser).__name__}", f"known: {known}")

    def arguments(rows: int) -> Arguments:
        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=of, device="meta")

        common = {"hidden_states": zeros(rows, *latent), "timestep": zeros(rows)}
        return common | _ARGUMENTS[kind](denoiser.config, zeros, rows, tokens)

    if kind in (UNet2DConditionModel, UNet2DModel):

        def of_unet(rows: int) -> Arguments:
            found = arguments(rows)
            found["sample"] = found.pop("hidden_states")
            return found

        return of_unet
    return arguments


def _unet(config: Any, zeros: Any, rows: int, tokens: int) -> Arguments:
    found = {"encoder_hidden_states": zeros(rows, tokens, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        ids = 6 * config.addition_time_embed_dim
        pooled = zeros(rows, config.projection_class_embeddings_input_dim - ids)
        found["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": zeros(rows, 6)}
    return found


def _class_labels(config: Any, zeros: Any, rows: int, tokens: int) -> Arguments:
    labelled = getattr(config, "num_class_embeds", None) or hasattr(config, "num_embeds_ada_norm")
    return {"class_labels": zeros(rows, of=torch.int64)} if labelled else {}


def _pixart(config: Any, zeros: Any, rows: int, tokens: int) -> Arguments:
    added = {"resolution": None, "aspect_ratio": None}
    if config.use_additional_conditions or config.sample_size == 128 and tokens == 120:
        added = {"resolution": zeros(rows, 2), "aspect_ratio": zeros(rows, 1)}
    return {
        "encoder_hidden_states": zeros(rows, tokens, config.caption_channels),
        "encoder_attention_mask": zeros(rows, tokens),
        "added_cond_kwargs": added,
    }


def _sd3(config: Any, zeros: Any, rows: int, tokens: int) -> Arguments:
    return {
        "encoder_hidden_states": zeros(rows, tokens, config.joint_attention_dim),
        "pooled_projections": zeros(rows, config.pooled_projection_dim),
    }


def _flux(config: Any, zeros: Any, rows: int, tokens: int) -> Arguments:
    return {
        **_sd3(config, zeros, rows, tokens),
        "hidden_states": zeros(rows, FLUX_TOKENS, config.in_channels),
        "img_ids": zeros(FLUX_TOKENS, 3),
        "txt_ids": zeros(tokens, 3),
        "guidance": zeros(rows) if config.guidance_embeds else None,
    }


_ARGUMENTS: dict[type, Callable[[Any, Any, int, int], Arguments]] = {
    UNet2DConditionModel: _unet,
    UNet2DModel: _class_labels,
    DiTTransformer2DModel: _class_labels,
    PixArtTransformer2DModel: _pixart,
    SD3Transformer2DModel: _sd3,
    FluxTransformer2DModel: _flux,
}


# ------------------------------------------------------------------ from a source to modules


def _random(name: str) -> dict[str, nn.Module]:
    known = {**PUBLISHED, **RANDOM}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean random:{close[0]}?" if close else f"known: {', '.join(known)}"
        raise ModelError(f"no architecture random:{name}", hint)
    with torch.device("meta"):
        if name not in RANDOM:
            return PUBLISHED[name]()
        components = RANDOM[name]().components
    return {n: m for n, m in components.items() if isinstance(m, nn.Module)}


def _find(source: str) -> Path:
    if source.startswith("zoo:"):
        return zoo_path(source.removeprefix("zoo:"))
    folder = Path(source)
    if not folder.is_dir() and source.count("/") == 1 and source[0] not in "./~":
        try:
            folder = Path(DiffusionPipeline.download(source, local_files_only=True))
        except Exception as error:  # of many kinds; all mean: not here
            raise ModelError(
                f"{source}: is not on this machine, and a plan downloads nothing",
                "give a folder, or the shapes of a published model: "
                + ", ".join(f"random:{n}" for n in {**RANDOM, **PUBLISHED}),
            ) from error
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{source}: no model_index.json", "a diffusers pipeline folder has one")
    return folder


Found = tuple[dict[str, nn.Module], dict[str, Any] | None, dict[str, int], dict[str, int]]


def _folder(folder: Path, source: str) -> Found:
    """Modules on meta; the scheduler's configuration; bytes on disk by component; parameters of
    the components that are not diffusers' (text encoders). Raises ModelError."""
    modules: dict[str, nn.Module] = {}
    stored: dict[str, int] = {}
    unbuilt: dict[str, int] = {}
    scheduler = None
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        for name, entry in index.items():
            if not isinstance(entry, list) or entry[0] is None:
                continue
            if name == "scheduler":
                text = (folder / name / "scheduler_config.json").read_text(encoding="utf-8")
                scheduler = json.loads(text)
                continue
            stored[name], counted = _weights(folder / name)
            kind = _module_class(*entry)
            if kind is not None:
                with torch.device("meta"):
                    modules[name] = kind.from_config(kind.load_config(folder / name))
            elif counted:
                unbuilt[name] = counted
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(
            f"{source}: cannot be read: {str(error).strip().splitlines()[0][:160]}",
            "is the folder complete?",
        ) from error
    return modules, scheduler, stored, unbuilt


def _module_class(library: str, name: str) -> Any:
    """diffusers' own or ours; None for others."""
    package = __name__.partition(".")[0]
    if library == "diffusers":
        return getattr(diffusers, name)
    if library.startswith(f"{package}.models."):
        return getattr(importlib.import_module(library), name)
    return None


def _weights(folder: Path) -> tuple[int, int]:
    """Bytes and elements of a component's safetensors, of the one variant that is loaded."""
    paths = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    plain = [p for p in paths if p.name.count(".") == 1]
    elements = 0
    for path in plain:
        with safe_open(path, framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        elements += sum(math.prod(shape) for shape in shapes)
    return sum(p.stat().st_size for p in plain), elements


# ------------------------------------------------------------------ published configurations


def _kl(channels: int) -> AutoencoderKL:
    """f8: Stable Diffusion's and SDXL's with 4 channels, SD3's and FLUX's with 16."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
        sample_size=1024,
    )


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
    return {"unet": unet, "vae": _kl(4)}


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
    return {"transformer": transformer, "vae": _kl(4)}


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
    return {"transformer": transformer, "vae": _kl(16)}


def _flux_dev() -> dict[str, nn.Module]:
    """black-forest-labs/FLUX.1-dev: 19 double and 38 single blocks, 24 heads of 128."""
    return {"transformer": FluxTransformer2DModel(guidance_embeds=True), "vae": _kl(16)}


PUBLISHED: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "sdxl": _sdxl,
    "pixart-sigma": _pixart_sigma,
    "sd3": _sd3_medium,
    "flux-dev": _flux_dev,
}
