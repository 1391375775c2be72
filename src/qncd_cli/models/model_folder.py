"""Where a model's folder is: on this machine, in the hub's cache, or still at the hub."""

from __future__ import annotations

import os
from pathlib import Path

from diffusers import DiffusionPipeline

from ..config.model_card import folder_of
from ..errors import ModelError
from .folder_check import reason


def find_folder(source: str) -> Path:
    """Folder of a pipeline; a hub id is downloaded where it is not here. Raises ModelError."""
    path = Path(source)
    if os.path.isdir(source):
        if not (path / "model_index.json").is_file():
            raise ModelError(
                f"{source}: no model_index.json", "a diffusers pipeline folder has one"
            )
        return path
    if os.path.isfile(source):
        raise ModelError(
            f"{source}: is a file",
            "give a diffusers folder, a hub id, zoo:NAME, or a checkpoint (.ckpt, .safetensors)",
        )
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ModelError(f"{source}: no such folder", "give a diffusers folder, hub id or zoo:NAME")
    try:
        return _download(source)
    except Exception as error:  # diffusers and the hub raise many kinds; all mean: not to be had
        raise ModelError(
            f"{source}: no such folder, and not to be had from the hub ({reason(error)})",
            "check the name, or download it and give the folder",
        ) from error


def find_base(base: str) -> Path:
    """The folder that model.base names. Raises ModelError."""
    folder = folder_of(base)
    if folder is None:
        raise ModelError(
            f"model.base {base}: neither a pipeline folder here nor in the hub's cache",
            "give a folder with a model_index.json, or download what is small of one: "
            "hf download OWNER/NAME --include '*.json' '*.txt' '*.model'",
        )
    return folder


def _download(source: str) -> Path:
    """A model of the hub in the cache: its plain weights, or fp16 where it has no others."""
    try:
        return Path(DiffusionPipeline.download(source))
    except Exception as error:
        try:
            return Path(DiffusionPipeline.download(source, variant="fp16"))
        except Exception:
            raise error from None
