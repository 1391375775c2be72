"""Which files of a folder are its images, in which order; reference.py reads their pixels.

Nothing here needs torch.

| what | rule |
|---|---|
| read | IMAGE_SUFFIXES in any case, in sub-folders too, links to folders followed |
| order | by path, numbers in names as numbers: 2.png before 10.png |
| left out without a word | hidden files and folders; ASIDE_SUFFIXES and ASIDE_NAMES |
| refused | every other file, as an image that would be missing from the set |
| orientation | as Exif says |
| transparency | laid on white |
| grey, palettes, CMYK | turned into RGB |
| more than 8 bits, several frames | refused |
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..errors import ArtifactError
from ..store.regular import open_regular

# what torch-fidelity and pytorch-fid read, and GIF
IMAGE_SUFFIXES = (
    *(".bmp", ".gif", ".jpg", ".jpeg", ".pgm"),
    *(".png", ".ppm", ".tif", ".tiff", ".webp"),
)
ASIDE_SUFFIXES = (
    *(".csv", ".html", ".json", ".jsonl", ".log"),
    *(".md", ".txt", ".xml", ".yaml", ".yml"),
)
"""Endings of texts that come with sets of images: labels, captions, licences, manifests."""
ASIDE_NAMES = ("latents.safetensors", "LICENSE", "README", "Thumbs.db", "desktop.ini")
"""Names of files that a sample set or an operating system keeps beside images."""


def image_paths(folder: Path) -> list[Path]:
    """The images of a folder and of the folders in it, in the order of the table above.

    Raises ArtifactError if the folder is missing, holds no images, or holds files that are
    neither read nor known to be beside the point: a set without them is another set.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder of images", "check the path")
    files = [path for path in _files(folder) if not _aside(path)]
    read = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise ArtifactError(f"{folder}: no images in this folder", _readable())
    if len(read) < len(files):
        others = sorted(set(files) - set(read))
        kinds = Counter(path.suffix.lower() or "without a suffix" for path in others)
        named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
        raise ArtifactError(
            f"{folder}: {len(files)} files, {len(read)} read; not {named} "
            f"(first: {others[0].relative_to(folder)})",
            f"convert them or move them away: {_readable()}",
        )
    return sorted(read, key=lambda path: _natural(path.relative_to(folder)))


def _readable() -> str:
    return f"images are {', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)}"


def _files(folder: Path) -> Iterable[Path]:
    """Every file that is not hidden, links followed. Raises ArtifactError for links in a circle."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            raise ArtifactError(
                f"{place}: links lead to this folder twice", "its images would count twice"
            )
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _aside(path: Path) -> bool:
    return path.suffix.lower() in ASIDE_SUFFIXES or path.name in ASIDE_NAMES


def _natural(path: Path) -> list[tuple[list[tuple[int, str]], str]]:
    """Numbers sort as numbers and before letters; names that differ in zeros alone, as text."""
    return [
        (
            [(int(run), "") if run.isdecimal() else (-1, run) for run in _runs(part)],
            part,
        )
        for part in path.parts
    ]


def _runs(name: str) -> list[str]:
    return [run for run in re.split(r"(\d+)", name) if run]


def digest_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of files in their order, whatever they are called."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open_regular(path) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ArtifactError(
                f"{path}: {error.strerror or error}", "make it again or move it away"
            ) from error
    return digest.hexdigest()
