"""Images that sampling begins from or is steered by: files in their order, and their digest.

Files are read for their digest alone; what they show is looked at when the model is loaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..store.digests import digest_of
from ..store.regular import open_regular
from .lora_names import split_lora

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
KEYS = ("images", "masks", "control")
BRANCH = "lora_branch"
INPUTS = "inputs"
"""Key of the section `sampling` that holds the digest of the files' contents."""
Find = Callable[[str], Path | None]
"""From a name to what is there by that name."""


def read_inputs(sampling: dict[str, Any], find: Find) -> None:
    """Put absolute paths of files in the place of names of files and folders, and their digest.

    sampling: a section that nobody has validated yet. One that has a digest holds paths already,
    and the files have to be the same still. Raises ConfigError.
    """
    if all(sampling.get(key) is None for key in (*KEYS, BRANCH)):
        return
    for key in KEYS:
        if sampling.get(key) is not None:
            sampling[key] = _files(sampling[key], key, find)
    keys = KEYS if sampling.get("control") is not None else KEYS[:2]  # as before there was the key
    found = digest_of([[_digest(path, key) for path in sampling.get(key) or ()] for key in keys])
    if sampling.get(BRANCH):
        sampling[BRANCH], digests = _loras(sampling[BRANCH], find)
        found = digest_of([found, digests])
    if sampling.get(INPUTS) not in (None, found):
        raise ConfigError(
            "sampling.images, masks, control: a file was changed since the configuration was made",
            "restore it, or give the images anew",
        )
    sampling[INPUTS] = found


def _files(named: Any, key: str, find: Find) -> list[str]:
    """A name or a list of names -> absolute paths; the images of a folder by name."""
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"sampling.{key}: expected a file, a folder, or a list of files")
    found: list[str] = []
    for name in names:
        path = find(name)
        if path is None:
            raise ConfigError(f"sampling.{key}: no file or folder {name}")
        here = sorted(p for p in path.iterdir()) if path.is_dir() else [path]
        if path.is_dir():
            here = [p for p in here if p.suffix.lower() in ENDINGS]
        if not here:
            raise ConfigError(f"sampling.{key}: no images in {name}", f"{', '.join(ENDINGS)}")
        found += [os.path.abspath(p) for p in here]
    return found


def _loras(named: Any, find: Find) -> tuple[list[str], list[str]]:
    """FILE or FILE:WEIGHT each, with absolute paths, and digests of the files."""
    placed, digests = [], []
    for lora in [named] if isinstance(named, str) else named:
        try:
            name, weight = split_lora(str(lora))
        except ValueError as error:
            raise ConfigError(f"sampling.{BRANCH}: {error}") from error
        path = find(name)
        if path is None or path.is_dir():
            raise ConfigError(f"sampling.{BRANCH}: no file {name}", "give a LoRA file")
        placed.append(f"{os.path.abspath(path)}:{weight:g}")
        digests.append(_digest(os.path.abspath(path), BRANCH))
    return placed, digests


def _digest(path: str, key: str) -> str:
    try:
        with open_regular(Path(path)) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"sampling.{key}: {path}: cannot be read: {error.strerror}") from error
