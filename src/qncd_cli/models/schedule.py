"""The configuration of a pipeline's scheduler, as the pipeline sets it for images of one size."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, StableDiffusionPipeline

SD3_MAX_SHIFT, FLUX_MAX_SHIFT = 1.16, 1.15
"""The pipelines' own, where the scheduler has none."""
LEFT_OPEN = "_use_default_values"
"""diffusers' name for the keys that a configuration did not set."""
FROM_ONE = "FlowMatchFromOne"
"""The scheduler of `sampling.flow` that sets its steps as FluxPipeline does."""
FROM_ONE_SOLVERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""Schedulers of diffusers in whose place FROM_ONE is used for FluxPipeline's folders."""


def schedule_of(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Its scheduler's configuration, the class of which it is among it.

    diffusers remembers which keys a file left to their defaults, and leaves them out when another
    scheduler is made from the configuration; those that the pipeline corrected since are no such.
    """
    scheduler = pipeline.scheduler
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    if (left := config.get(LEFT_OPEN)) is not None:
        own = inspect.signature(type(scheduler)).parameters
        same = [k for k in left if k not in own or own[k].default == config.get(k)]
        config[LEFT_OPEN] = same
    return config


def corrected(kind: str, unet: Any, config: dict[str, Any]) -> dict[str, Any]:
    """A folder's scheduler configuration as its pipeline of that class corrects it on loading.

    StableDiffusionPipeline does so with folders of early versions, and with the size in the
    configuration of their unet, which is put right as well.
    """
    if kind != "StableDiffusionPipeline":
        return config
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what it corrects
        pipeline = StableDiffusionPipeline(
            **absent,
            unet=unet,
            scheduler=scheduler,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return schedule_of(pipeline)


def distilled(config: dict[str, Any]) -> str:
    """What there is to say of the scheduler of a distilled model (Turbo, Lightning), else nothing.

    Such folders space their timesteps from the last one on, as do those of models that were trained
    to start without any signal (zero terminal SNR), which are no such models.
    """
    trailing = config.get("timestep_spacing") == "trailing"
    if not trailing or config.get("rescale_betas_zero_snr", False):
        return ""
    return (
        f"the folder's {config['_class_name']} with trailing timesteps is that of distilled models "
        "(Turbo, Lightning): take the few steps and the guidance that the model's card names"
    )


def shifted(config: dict[str, Any], tokens: int, most: float) -> dict[str, Any]:
    """A flow scheduler's configuration; base_shift is the shift mu for images of that many tokens.

    The shift grows linearly with the tokens (SD3, 2403.03206, sec. 5.3.2; FLUX). most: the
    pipeline's default for max_shift.
    """
    if not config.get("use_dynamic_shifting", False):
        return config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", most)
    mu = low + (high - low) * (tokens - few) / (many - few)
    return {**config, "base_shift": mu, "max_shift": mu}
