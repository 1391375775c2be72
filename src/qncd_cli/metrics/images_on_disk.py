"""Images on disk, read when they are asked for: a set of them is never in memory as a whole."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from .. import __version__
from ..errors import ArtifactError
from ..store.digests import digest_of
from ..store.file_stamps import cache_folder
from ..store.files import write_bytes
from ..store.regular import open_regular
from .image_files import digest_of_files
from .networks import first_line

LARGEST = 1 << 26
"""Pixels from which on an image is refused before it is decoded: 8192 x 8192."""
TOLD = 3
"""Broken files that are named at once."""
# Pillow would clip these to 8 bits when it converts them to RGB
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
CHUNK = 64
"""Images that are looked at together; larger: more memory, a little faster."""

Check = Callable[[Sequence[Path], Tensor], None]


class ImagesOnDisk:
    """Files that hold one image each, in the place of a tensor uint8 [N, 3, H, W].

    check: raises for images that are not what they should be, whenever they are read; like: an
    image whose size all have to have, the first one's unless given. Reading raises what
    `read_images` raises.
    """

    dtype = torch.uint8

    def __init__(self, paths: Sequence[Path], check: Check | None = None, like: Path | None = None):
        self.paths, self._check = list(paths), check
        self._like = like or next(iter(paths), None)

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def shape(self) -> torch.Size:
        """The whole set's."""
        assert self._like is not None, "no images have no size"
        return torch.Size((len(self.paths), *read_images([self._like]).shape[1:]))

    def __getitem__(self, row: int) -> Tensor:
        return self._read([self.paths[row]])[0]

    def split(self, count: int) -> Iterator[Tensor]:
        """All images, so many at a time."""
        for start in range(0, len(self.paths), count):
            yield self._read(self.paths[start : start + count])

    def read(self) -> Tensor:
        """All of them at once: for a few."""
        return self._read(self.paths)

    def take(self, rows: Sequence[int]) -> ImagesOnDisk:
        """The images of these rows."""
        return ImagesOnDisk([self.paths[row] for row in rows], self._check, self._like)

    def _read(self, paths: Sequence[Path]) -> Tensor:
        images = read_images(paths, self._like, self.shape[1:])
        if self._check is not None:
            self._check(paths, images)
        return images


Images = Tensor | ImagesOnDisk


def checked_images(paths: Sequence[Path], skipped: list[Path] | None = None) -> ImagesOnDisk:
    """Images of whatever origin, each of which was read once, now or by an earlier call.

    skipped: receives files that cannot be read, which are left out then. Raises ArtifactError, with
    the names of the files, if images are damaged, deeper than 8 bits, or of several frames, and for
    one of another size than the first.
    """
    note = _note_of(paths)
    if note is not None and note.is_file():
        return ImagesOnDisk(paths)
    sound: list[Path] = []
    shape: Sequence[int] = ()
    broken = []
    for path in paths:
        try:
            image = _read_image(path)
        except ArtifactError as error:
            broken.append((path, error))
            continue
        shape = shape or image.shape
        if not (broken and skipped is None):  # which is told instead
            _check_size(path, image.shape, (sound or [path])[0], shape)
        sound.append(path)
    if broken and (skipped is None or not sound):
        raise _broken(broken, len(paths))
    if skipped is not None:
        skipped += [path for path, _ in broken]
    if note is not None and not broken:
        with suppress(ArtifactError):  # it is looked at again then
            write_bytes(note, b"")
    return ImagesOnDisk(sound)


def _note_of(paths: Sequence[Path]) -> Path | None:
    """The file of the user's cache that is there where these very images were found sound; None
    for files that cannot be read."""
    try:
        content = digest_of_files(paths)
    except ArtifactError:
        return None
    return cache_folder() / "sound" / digest_of([content, __version__, Image.__version__])


def read_images(
    paths: Sequence[Path], like: Path | None = None, shape: Sequence[int] | None = None
) -> Tensor:
    """Images in the order of their paths -> uint8 [N, 3, H, W]; at least one.

    like, shape: an image whose shape all have to have, the first one's unless given. Raises
    ArtifactError, with the file's name, for one that is damaged, deeper than 8 bits, of several
    frames, or of another size.
    """
    first = _read_image(paths[0])
    like, shape = (paths[0], first.shape) if like is None or shape is None else (like, shape)
    images = torch.empty((len(paths), *shape), dtype=torch.uint8)
    for index, path in enumerate(paths):
        image = first if index == 0 else _read_image(path)
        _check_size(path, image.shape, like, shape)
        images[index] = image
    return images


def _check_size(path: Path, found: Sequence[int], like: Path, shape: Sequence[int]) -> None:
    if tuple(found) != tuple(shape):
        raise ArtifactError(
            f"{path}: {_size(found)} pixels, but {like.name} has {_size(shape)}",
            "all images of a set must have one size: resize this one or move it away",
        )


def _broken(broken: Sequence[tuple[Path, ArtifactError]], count: int) -> ArtifactError:
    path, error = broken[0]
    if len(broken) == 1:
        return error
    names = ", ".join(other.name for other, _ in broken[:TOLD])
    more = f" and {len(broken) - TOLD} more" if len(broken) > TOLD else ""
    return ArtifactError(
        f"{len(broken)} of {count} images cannot be read: {names}{more} (first: {error.message})",
        error.hint,
    )


def _read_image(path: Path) -> Tensor:
    """-> uint8 [3, H, W]."""
    try:
        with _unwarned(), open_regular(path) as file, Image.open(file) as image:
            if image.width * image.height > LARGEST:
                said = f"{image.width}x{image.height} pixels, more than {LARGEST}"
                raise ArtifactError(f"{path}: {said}", "make it smaller or move it away")
            deep = image.mode if _deep(image) else ""
            frames = getattr(image, "n_frames", 1)
            photograph = image.format == "MPO"  # a JPEG with previews of itself
            pixels = np.array(_on_white(ImageOps.exif_transpose(image)))
    except (
        *(OSError, SyntaxError, ValueError, TypeError, IndexError, OverflowError, struct.error),
        *(Image.DecompressionBombError, zlib.error),
    ) as error:
        raise ArtifactError(
            f"{path}: not a readable image: {first_line(error)}", "make it again or move it away"
        ) from error
    if deep:
        raise ArtifactError(f"{path}: more than 8 bits a channel ({deep})", "convert it to 8 bits")
    if frames > 1 and not photograph:
        raise ArtifactError(f"{path}: {frames} frames in one file", "store one image a file")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _unwarned() -> warnings.catch_warnings:
    """Pillow's warning of large images: ours is an error."""
    return warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)


def _deep(image: ImageFile.ImageFile) -> bool:
    """Whether an image has over 8 bits a channel; of colours only the decoder's mode says so."""
    return image.mode in DEEP_MODES or any(_deep_code(*tile) for tile in image.tile)


def _deep_code(codec: str, extents: Any, offset: int, args: Any) -> bool:
    """Whether a decoder of Pillow's reads more than 8 bits a channel; BGR;16 is 5, 6 and 5."""
    values = args if isinstance(args, tuple) else (args,)
    code = str(values[0]) if values else ""
    return (";16" in code and code != "BGR;16") or (codec == "ppm" and max(values[1:]) > 255)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    pixels = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")


def _size(shape: Sequence[int]) -> str:
    return f"{shape[-1]}x{shape[-2]}"
