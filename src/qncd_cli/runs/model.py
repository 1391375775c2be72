"""The configured model of a run: what is known of it beforehand, and how it is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..config.schema import Config
from ..errors import ConfigError
from ..models.digest import known_digest, with_loras
from .watch import SILENT, Watch

if TYPE_CHECKING:
    from ..models.loading import DiffusionModel
    from ..models.text_encoders import OtherEncoders
    from ..store.artifacts import Artifact


def model_digest(config: Config) -> str | None:
    """Digest of the configured model; None where only loading it tells."""
    model = config.model
    digest = known_digest(model.source, model.compvis_config, model.tokenizer, model.base)
    return None if digest is None else with_loras(digest, model.lora)


def open_model(
    config: Config,
    device: str = "auto",
    folder: Path | None = None,
    watch: Watch = SILENT,
    *,
    encoders: OtherEncoders | None = None,
    keep_text: bool = False,
) -> DiffusionModel:
    """The configured model, with diffusers silenced: what it has to say is said by our errors.

    folder: of a run, where encoded prompts are kept; encoders, keep_text: as `load_model` has them.
    Raises ModelError.
    """
    from ..models.control import ControlImages
    from ..models.loading import load_model
    from ..models.prompt_cache import PromptCache
    from ..models.start_images import StartImages
    from ..models.text import Prompts

    silence_diffusers()
    watch.imported()
    model, sampling = config.model, config.sampling
    prompts, images, control, sizes = None, None, None, config.calibration.sizes or ()
    if sampling.images is not None:
        images, sizes = StartImages(sampling.images, sampling.masks or ()), ()  # of one shape
    if sampling.control is not None:
        scale = sampling.control_scale
        control, sizes = ControlImages(sampling.control, 1.0 if scale is None else scale), ()
    if sampling.prompts is not None:
        prompts = Prompts(
            sampling.prompts,
            sampling.negative_prompt,
            image_size=sampling.sides,
            guidance_scale=sampling.guidance_scale,
            images=images,
            control=control,
        )
    return load_model(
        model.source,
        model.dtype,
        device,
        compvis_config=model.compvis_config,
        tokenizer=model.tokenizer,
        base=model.base,
        loras=model.lora,
        branch=sampling.lora_branch or (),
        prompts=prompts,
        image_size=sampling.sides if prompts is None else None,
        sizes=sizes,
        tile=config.first_stage.tile,
        cache=PromptCache(folder / "prompts") if folder is not None else None,
        encoders=encoders,
        keep_text=keep_text,
        tell=watch.note,
        track=watch.track,
    )


def note_sampling(watch: Watch, config: Config, model: DiffusionModel) -> None:
    """Say what of the way of sampling may surprise."""
    from ..models.schedule import distilled

    if remark := distilled(model.scheduler_config):
        watch.note(f"{model.source}: {remark}")
    if model.interpolates and config.sampling.guidance_scale == 0:
        watch.note("guidance 0: every image is of the null class, whatever sampling.classes says")


def note_size(
    watch: Watch, config: Config, model: DiffusionModel, quantized: tuple[Artifact, Artifact] | None
) -> None:
    """Say where images are of a size that calibration has not seen. quantized: the quantized model
    and its noise statistics, which say what sampling's own size was."""
    if quantized is None or model.size in (config.calibration.sizes or ()):
        return
    shape = quantized[1].body.get("latent_shape")
    if shape is not None and shape != list(model.latent_shape):
        height, width = model.size or ("the model's", "own")
        watch.note(
            f"{height} x {width}: activation ranges are of other sizes; a run with this one among "
            "calibration.sizes has seen it"
        )


def check_unbranched(config: Config) -> None:
    """Raises ConfigError where a LoRA is to be computed beside layers that are yet to be made."""
    if config.sampling.lora_branch:
        raise ConfigError(
            "sampling.lora_branch is of qncd sample alone",
            "give model.lora (--lora) to calibrate and quantize with a LoRA",
        )


def silence_diffusers() -> None:
    """Silence diffusers for the rest of this process."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
