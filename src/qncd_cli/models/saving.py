"""A pipeline -> a diffusers folder, whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from ..errors import ArtifactError


def check_target(folder: Path, *, force: bool) -> None:
    """Raises ArtifactError unless a pipeline may be written there.

    force: a diffusers folder may be replaced; nothing else ever is.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder}: is a file", "name a new folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / "model_index.json").is_file():
        raise ArtifactError(
            f"{folder}: is not empty and no diffusers folder, so that it is not replaced",
            "name a new folder",
        )
    if not force:
        raise ArtifactError(f"{folder}: is there already", "--force replaces it")


def save_folder(pipeline: DiffusionPipeline, folder: Path, *, force: bool) -> None:
    """Written beside its place under a temporary name, and renamed at the end.

    Raises ArtifactError when the disk is full or the place cannot be written or is taken.
    """
    check_target(folder, force=force)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
            made, replaced = Path(beside) / "made", Path(beside) / "replaced"
            pipeline.save_pretrained(made)
            for path in made.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            if folder.is_dir():
                folder.rename(replaced)
            try:
                made.rename(folder)
            except OSError:
                if replaced.is_dir():
                    replaced.rename(folder)
                raise
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder}: cannot be written ({str(error).splitlines()[0][:120]})",
            "is there space, and may you write there?",
        ) from error
