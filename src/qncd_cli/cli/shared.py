"""What several commands need."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ..config.schema import Config
from ..store.run_dir import RunDir
from ..vocabulary import phrase
from .console import Console
from .process import collect_as_usual

UNSAID = ("because", "keys")
"""Keys of a stage's payload that were told before it began."""


def open_model(config: Config, device: str = "auto", folder: Path | None = None) -> Any:
    """The configured model, with diffusers silenced: what it has to say is said by our errors.

    folder: of a run, where encoded prompts are kept.
    """
    from ..models.loading import load_model
    from ..models.prompt_cache import PromptCache
    from ..models.text import Prompts

    silence_diffusers()
    collect_as_usual()
    model, sampling = config.model, config.sampling
    prompts = None
    if sampling.prompts is not None:
        prompts = Prompts(
            sampling.prompts,
            sampling.negative_prompt,
            image_size=sampling.image_size,
            guidance_scale=sampling.guidance_scale,
        )
    return load_model(
        model.source,
        model.dtype,
        device,
        compvis_config=model.compvis_config,
        tokenizer=model.tokenizer,
        prompts=prompts,
        cache=PromptCache(folder / "prompts") if folder is not None else None,
        tell=partial(click.echo, err=True),
        track=Console().track,
    )


def note_sampling(console: Console, config: Config, model: Any) -> None:
    """Say what of the way of sampling may surprise."""
    from ..models.schedule import distilled

    if remark := distilled(model.scheduler_config):
        console.note(f"{model.source}: {remark}")
    if model.interpolates and config.sampling.guidance_scale == 0:
        console.note("guidance 0: every image is of the null class, whatever sampling.classes says")


def download(source: str) -> None:
    """Bring a model of the hub to this machine. Raises ModelError."""
    from ..models.loading import find_folder

    silence_diffusers()
    find_folder(source)


def silence_diffusers() -> None:
    """Silence diffusers for the rest of this process."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def done(console: Console, stage: str, run: RunDir, **more: Any) -> None:
    """The result of a stage that ended."""
    seconds = console.lap()
    payload = {"stage": stage, "run_dir": str(run.path), "seconds": round(seconds, 2), **more}
    more = {k: v for k, v in more.items() if k not in UNSAID}

    def render() -> None:
        what = "unchanged, skipped" if more.get("skipped") else f"done in {seconds:.1f} s"
        details = [phrase(k, v) for k, v in more.items() if k != "skipped"]
        print(f"{stage}: {what}" + (f" ({', '.join(details)})" if details else ""))

    console.result(payload, render)
