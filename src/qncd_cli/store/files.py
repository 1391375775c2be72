"""Files are written whole or not at all, and JSON in one spelling.

This module is the only writer of the run directory: store/artifacts.py adds what tensor files
hold, store/run_dir.py where everything lies. A file is written beside its place
(store/unfinished.py), synced and renamed, so that it is either the old one or the new one.
Links are written through: what they lead to is replaced, they stay.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from .digests import digest_of
from .regular import read_regular
from .unfinished import unfinished_beside

CONTENT = "content"
"""Key of a JSON file's own digest."""
LARGEST_JSON = 1 << 28
"""Bytes from which on a JSON file is refused: the manifest of a million samples has 2e7."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place for a file that takes the place of `path` when the block ends well, and not before.

    Raises ArtifactError when the disk is full or the place cannot be written.
    """
    named, path = path, target_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished_beside(path, _new_file) as (temporary, mode):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, mode)  # whoever wrote it may have made it anew
            os.replace(temporary, path)
            sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ArtifactError(
                f"{named}: no room on disk", "free some space and repeat the command"
            ) from error
        raise ArtifactError(f"{named}: cannot be written: {error.strerror or error}") from error


def _new_file(place: Path) -> int:
    """Make an empty file; its mode, as the user's mask leaves it."""
    handle = os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """What was renamed in a folder outlives a power cut, where the file system can promise it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(handle)


def target_of(path: Path) -> Path:
    """The place that a path leads to, through links, whether something is there or not.

    Raises ArtifactError for links that lead in a circle.
    """
    place = Path(os.path.realpath(path))
    if place.is_symlink():
        raise ArtifactError(f"{path}: a link that leads back to itself", "remove it")
    return place


def write_bytes(path: Path, data: bytes) -> None:
    """Atomically. Raises ArtifactError when the disk is full or the place cannot be written."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def check_place(folder: Path, names: Iterable[str]) -> None:
    """Check before long work that these files can be written into a folder, which may be missing.

    Nothing is made. Raises ArtifactError.
    """
    place = target_of(folder)
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        raise ArtifactError(f"{folder}: {there} is a file", "name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ArtifactError(f"{folder}: cannot be written", f"you may not write in {there}")
    for name in names:
        if (place / name).is_dir():
            raise ArtifactError(f"{folder / name}: is a folder", "name another place")


def check_folder(folder: Path, marker: str, kind: str, *, force: bool) -> None:
    """Raises ArtifactError unless a folder may be written there.

    force: a folder that holds the file `marker`, one of this kind, may be replaced; nothing else
    ever is.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder}: is a file", "name a new folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / marker).is_file():
        raise ArtifactError(
            f"{folder}: is not empty and no {kind}, so that it is not replaced",
            "name a new folder",
        )
    if not force:
        raise ArtifactError(f"{folder}: is there already", "--force replaces it")


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A place for a folder's content, which takes the place of `folder` when the block ends well.

    Raises ArtifactError when the disk is full or the place cannot be written.
    """
    named, folder = folder, target_of(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with unfinished_beside(folder, Path.mkdir) as (beside, _):
            made, replaced = beside / "made", beside / "replaced"
            made.mkdir()
            yield made
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
            sync_folder(folder.parent)
    except OSError as error:
        raise unwritable(named, error) from error


def unwritable(folder: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{folder}: cannot be written ({str(error).splitlines()[0][:120]})",
        "is there space, and may you write there?",
    )


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def write_sealed_json(path: Path, value: dict[str, Any]) -> None:
    """write_json, with the digest of all else under CONTENT."""
    content = json.loads(json.dumps(value, allow_nan=False))  # as it will be read
    write_json(path, {**content, CONTENT: digest_of(content)})


def read_json(path: Path, command: str) -> Any:
    """Raises ArtifactError when missing or damaged; command: what makes a good one.

    Damaged is, too, what write_sealed_json wrote and is not the same any more. The digest is not
    among what is returned.
    """
    try:
        found = json.loads(read_regular(path, LARGEST_JSON), parse_constant=_no_number)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing", f'make it with "{command}"') from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: damaged: {error}", f'repeat "{command}"') from error
    if isinstance(found, dict) and CONTENT in found:
        said = found.pop(CONTENT)
        if digest_of(found) != said:
            raise ArtifactError(
                f"{path}: damaged, its content does not match its digest", f'repeat "{command}"'
            )
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def finite(value: Any) -> Any:
    """The same tree with NaN and infinities as null, for JSON."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
