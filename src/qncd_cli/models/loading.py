"""From a model source to what the stages need: denoiser, schedule, conditioning, decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..errors import BackendUnavailable, ModelError
from ..progress import Track, no_progress
from .adapters import ADAPTERS, Condition, Parts, with_control, with_images, with_size
from .call_signature import check_inputs, unify_call
from .compvis.checkpoint import compvis_pipeline
from .denoiser_folder import check_values
from .digest import checkpoint_digest, folder_digest, is_checkpoint, random_digest, with_loras
from .first_stage import FirstStage
from .folder_check import is_there, read_index
from .image_size import Sides, sides_of
from .lora import Branches, branches, fuse
from .model_folder import find_folder
from .pipeline_folder import FIRST_STAGES, UNUSED, load_pipeline
from .pipelines import CLASS_CONDITIONAL, is_guided
from .prompt_cache import PromptCache
from .prompt_length import Tell, untold
from .random_models import random_pipeline
from .schedule import schedule_of
from .single_file import file_pipeline
from .text import TEXT_TABLES, Prompts, check_encoded, encode
from .text_encoders import OtherEncoders, TextEncoders, encoders_of
from .zoo import zoo_path

TEXT_PARTS = tuple(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class DiffusionModel:
    """A diffusion model as the stages see it; no gradients, in eval mode.

    Its modules live on `device`; latents, labels and images that go in and out live on the CPU.

    denoiser: called as denoiser(x [N, *latent_shape], t, **condition).sample.
    condition: class labels [N] -> keyword arguments of the denoiser, batch first.
    null_condition: number of rows -> the same for the null class; None: no guidance possible.
    interpolates: whether guidance scales below 1 lead towards the null class, as CompVis has it;
    in diffusers' own pipelines guidance is off there.
    decode: latents [N, *latent_shape] -> images uint8 [N, C, H, W].
    num_classes: of a text model, the number of prompts; None for an unconditional model.
    scheduler_config: as the pipeline sets it for images of that size.
    digest: of the files that the model was read from.
    start: class labels [N] -> latents of the images that sampling begins from, None for noise;
    paints: whether the denoiser reads these images, so that it can also begin from noise.
    branches: of LoRAs, to be attached to whatever computes the denoiser.
    text: the text encoders, where they were asked to be kept.
    size: height and width of images in pixels as they were asked for, None for the model's own.
    sized: by height and width, the same model with the same modules, drawing images of that size.
    """

    source: str
    digest: str
    denoiser: nn.Module
    scheduler_config: dict[str, Any]
    latent_shape: tuple[int, ...]
    num_classes: int | None
    condition: Callable[[Tensor], Condition]
    null_condition: Callable[[int], Condition] | None
    interpolates: bool
    decode: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    device: torch.device
    start: Callable[[Tensor], Tensor] | None = None
    paints: bool = False
    branches: Branches = field(default_factory=dict)
    text: TextEncoders | None = None
    size: Sides | None = None
    sized: Mapping[Sides, DiffusionModel] = field(default_factory=dict)

    def labels(self, seeds: list[int], classes: str | tuple[int, ...]) -> Tensor:
        """One label per seed: classes in turn. Raises ModelError for a class out of range."""
        known = known_classes(self.source, self.num_classes, classes)
        if self.num_classes is None:
            return torch.zeros(len(seeds), dtype=torch.int64)
        return torch.tensor([known[s % len(known)] for s in seeds], dtype=torch.int64)

    def guides(self, scale: float) -> bool:
        """Whether a call of the denoiser holds every sample twice, once of the null class."""
        return self.null_condition is not None and is_guided(scale, self.interpolates)

    def denoiser_bytes(self) -> int:
        """Bytes of the denoiser's parameters in float32."""
        return 4 * sum(p.numel() for p in self.denoiser.parameters())


def known_classes(source: str, count: int | None, classes: str | tuple[int, ...]) -> Sequence[int]:
    """The classes that are asked of a model with so many; none of an unconditional one (None).

    Raises ModelError for a class out of range.
    """
    if count is None:
        if classes != "all":
            raise ModelError(
                f"{source} is unconditional and takes no classes", "leave classes: all"
            )
        return ()
    known = range(count) if classes == "all" else classes
    bad = [c for c in known if not 0 <= int(c) < count]
    if bad:
        raise ModelError(
            f"class {bad[0]} is out of range for {source}", f"it has classes 0 to {count - 1}"
        )
    return [int(c) for c in known]


def first_stage_of(model: DiffusionModel) -> FirstStage:
    """What makes images of a model's latents. Raises ModelError for a model of pixels."""
    if not isinstance(model.decode, FirstStage):
        raise ModelError(
            f"{model.source}: it draws pixels, there is no decoder of latents",
            "leave out what is set below first_stage (null)",
        )
    return model.decode


def load_model(
    source: str,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    compvis_config: str | None = None,
    tokenizer: str | None = None,
    base: str | None = None,
    loras: Sequence[str] = (),
    branch: Sequence[str] = (),
    prompts: Prompts | None = None,
    image_size: int | Sides | None = None,
    sizes: Sequence[Sides] = (),
    tile: int | None = None,
    cache: PromptCache | None = None,
    encoders: OtherEncoders | None = None,
    keep_text: bool = False,
    tell: Tell = untold,
    track: Track = no_progress,
) -> DiffusionModel:
    """zoo:NAME, random:NAME, a diffusers folder, a hub id, or a checkpoint file.

    device: auto takes a CUDA device if there is one. compvis_config, tokenizer: the YAML of
    a checkpoint, and its text encoder's; base: the pipeline folder of one that has no YAML; no
    other source reads them. loras: FILE or FILE:WEIGHT,
    fused one after the other; branch: such files that are not fused, but computed beside the
    denoiser's layers (the digest is that of the model without them). prompts: of text models, and
    of no others; image_size: of a model without prompts, as `Prompts` has it of the others; sizes:
    others that the model is `sized` for; tile: side of the tiles that images are decoded in, None
    for whole images; cache: where those that a folder's text encoders made are kept, which are then
    not even read again. encoders: encode the prompts in the place of the model's own; keep_text:
    the model's own stay with it, as `text`. tell: hears what a user should know.
    Raises ModelError, or BackendUnavailable for a device that is not there.
    """
    place, folder = find_device(device), _folder_of(source)
    encoded, path = None, None
    if folder is None:
        pipeline, digest = open_pipeline(source, compvis_config, tokenizer, tell, loras, base=base)
    else:
        _check_folder_alone(source, base)
        digest = with_loras(folder_digest(folder), loras)
        if cache is not None and prompts is not None:
            key = None if encoders is None else encoders.key
            path = cache.path(with_loras(digest, branch), dtype, prompts, key)
            encoded = cache.read(path, place)
        # a LoRA may be for the text encoders, too
        needed = encoded is None or keep_text or loras or branch
        left_out = UNUSED if needed else {*UNUSED, *TEXT_PARTS}
        loaded = torch.float32 if loras or branch else DTYPES[dtype]
        pipeline = load_pipeline(folder, source, loaded, left_out, tell)
        fuse(pipeline, loras, source)
    beside = branches(pipeline, branch, source)
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            own = torch.float32 if name in FIRST_STAGES else DTYPES[dtype]
            component.to(place, own).eval().requires_grad_(False)
            check_values(component, f"{source}: {name}")
    _check_kind(source, type(pipeline).__name__, prompts)
    if prompts is not None and encoded is None:
        if encoders is not None:
            encoders.install(encoders_of(pipeline))
        encoded = encode(pipeline, prompts, tell, track)
        if cache is not None and path is not None:
            cache.write(path, encoded)
    if encoded is not None:
        check_encoded(encoded, source)
    kind = type(pipeline).__name__

    def parts_of(size: int | Sides | None) -> Parts:
        if prompts is None:
            return with_size(source, pipeline, ADAPTERS[kind](pipeline, (None, None)), size)
        parts = ADAPTERS[kind](pipeline, (replace(prompts, image_size=size), encoded))
        parts = with_images(pipeline, parts, prompts.images, tell)
        return with_control(pipeline, parts, prompts.control, tell)

    def made(size: int | Sides | None, parts: Parts) -> DiffusionModel:
        model = DiffusionModel(
            source=source,
            digest=digest,
            dtype=DTYPES[dtype],
            device=place,
            interpolates=kind in CLASS_CONDITIONAL,
            branches=beside,
            text=TextEncoders(pipeline, prompts) if keep_text and prompts is not None else None,
            size=None if size is None else sides_of(size),
            **{"scheduler_config": schedule_of(pipeline), **parts},
        )
        return model if tile is None else replace(model, decode=first_stage_of(model).tiled(tile))

    size = image_size if prompts is None else prompts.image_size
    parts, others = parts_of(size), {other: parts_of(other) for other in sizes}
    check_inputs(parts["denoiser"], parts["condition"](torch.zeros(1, dtype=torch.int64)), source)
    unify_call(parts["denoiser"])
    sized = {other: made(other, found) for other, found in others.items()}
    return replace(made(size, parts), sized=sized)


def _check_kind(source: str, kind: str, prompts: Prompts | None) -> None:
    if kind not in ADAPTERS:
        raise ModelError(
            f"{source}: pipeline {kind} is not supported", f"supported: {', '.join(ADAPTERS)}"
        )
    if kind in TEXT_TABLES and prompts is None:
        raise ModelError(f"{source}: a text model needs prompts", "set sampling.prompts")
    if kind not in TEXT_TABLES and prompts is not None:
        raise ModelError(f"{source}: {kind} takes no prompts", "leave sampling.prompts out")


def open_pipeline(
    source: str,
    compvis_config: str | None,
    tokenizer: str | None = None,
    tell: Tell = untold,
    loras: Sequence[str] = (),
    *,
    base: str | None = None,
) -> tuple[DiffusionPipeline, str]:
    """The whole pipeline as it is stored, LoRAs fused, and the digest of its files; of parts that
    no stage needs, those that cannot be loaded are left out, which is told. Raises ModelError."""
    pipeline, digest = _opened(source, compvis_config, tokenizer, base, tell)
    fuse(pipeline, loras, source)
    return pipeline, with_loras(digest, loras)


def _opened(
    source: str,
    compvis_config: str | None,
    tokenizer: str | None,
    base: str | None,
    tell: Tell,
) -> tuple[DiffusionPipeline, str]:
    folder = _folder_of(source)
    if folder is not None:
        _check_folder_alone(source, base)
        try:
            pipeline = load_pipeline(folder, source, None, (), tell)
        except ModelError as error:
            unused = [part for part in UNUSED if is_there(read_index(folder, source), part)]
            if not unused:
                raise
            pipeline = load_pipeline(folder, source, None, unused, tell)
            tell(f"{source}: without {', '.join(unused)} ({error.message})")
        return pipeline, folder_digest(folder)
    if source.startswith("random:"):
        pipeline = random_pipeline(source.removeprefix("random:"))
        return pipeline, random_digest(source)
    if base is not None:
        pipeline = file_pipeline(source, base, tell)
        return pipeline, checkpoint_digest(source, None, None, base)
    pipeline = compvis_pipeline(source, compvis_config, tokenizer)
    return pipeline, checkpoint_digest(source, compvis_config, tokenizer)


def _check_folder_alone(source: str, base: str | None) -> None:
    if base is not None:
        raise ModelError(f"{source}: is no single file", "leave model.base out")


def _folder_of(source: str) -> Path | None:
    """None for random weights and checkpoints."""
    if source.startswith("random:") or is_checkpoint(source):
        return None
    if source.startswith("zoo:"):
        return zoo_path(source.removeprefix("zoo:"))
    return find_folder(source)


def find_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N. Raises BackendUnavailable."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackendUnavailable(f"unknown device {name}", "use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise BackendUnavailable(f"device {name} is not supported", "use auto, cpu or cuda")
    known = range(torch.cuda.device_count())  # torch reads cuda:999 as index -25
    if device.type == "cuda" and (device.index or 0) not in known:
        raise BackendUnavailable(f"no CUDA device for {name}", "use --device cpu")
    return device
