"""A pipeline -> a diffusers folder, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from ..store.files import check_folder, replacing_folder, unwritable


def check_target(folder: Path, *, force: bool) -> None:
    """Raises ArtifactError unless a pipeline may be written there.

    force: a diffusers folder may be replaced; nothing else ever is.
    """
    check_folder(folder, "model_index.json", "diffusers folder", force=force)


def save_folder(
    pipeline: DiffusionPipeline,
    folder: Path,
    *,
    force: bool,
    readme: str | None = None,
    beside: Sequence[Path] = (),
) -> None:
    """Written beside its place under a temporary name, and renamed at the end.

    readme: the text of its README.md, None for none; beside: files that are copied into it.
    Raises ArtifactError when the disk is full or the place cannot be written or is taken.
    """
    check_target(folder, force=force)
    try:
        with replacing_folder(folder) as made:
            pipeline.save_pretrained(made)
            if readme is not None:
                (made / "README.md").write_text(readme, encoding="utf-8")
            for path in beside:
                shutil.copyfile(path, made / path.name)
    except SafetensorError as error:
        raise unwritable(folder, error) from error
