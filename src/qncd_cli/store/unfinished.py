"""Unfinished files: where they are until they take their place, and how a dead process' are found.

They lie in a folder of our own beside their place, which is there while something is written.
Their names say whose they are, so that those of a process that is no more can be removed, and
nothing else ever is.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from .digests import digest_of

T = TypeVar("T")
WRITING = ".qncd-writing"
DAY = 86400.0
"""Seconds after which a file of another machine, whose processes cannot be seen, is given up."""
_numbers = itertools.count()


@contextmanager
def unfinished_beside(path: Path, make: Callable[[Path], T]) -> Iterator[tuple[Path, T]]:
    """A new place beside `path`, gone after the block, and what `make` returned of it.

    make: makes a file or a folder there. What dead processes left is removed. Raises OSError.
    """
    folder = path.parent / WRITING
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            _remove_dead(folder)
        place = folder / f"{_machine()}-{os.getpid()}-{next(_numbers)}"
        try:
            made = make(place)
            break
        except FileNotFoundError:  # the last of its files was finished, and the folder went
            if not folder.parent.is_dir():
                raise
    try:
        yield place, made
    finally:
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)
        _remove_if_empty(folder)


def remove_unfinished(root: Path) -> None:
    """Remove what dead processes left below a folder, at any depth."""
    for folder in root.rglob(WRITING):
        _remove_dead(folder)
        _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # another one is written there
        folder.rmdir()


def _remove_dead(folder: Path) -> None:
    with suppress(OSError):  # gone meanwhile, or nothing can be removed there
        for place in folder.iterdir():
            if _is_dead(place):
                if place.is_dir():
                    shutil.rmtree(place, ignore_errors=True)
                else:
                    place.unlink(missing_ok=True)


def _is_dead(place: Path) -> bool:
    machine, _, rest = place.name.partition("-")
    process = rest.partition("-")[0]
    if not process.isdecimal():
        return False
    if machine != _machine():
        return time.time() - place.stat().st_mtime > DAY
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _machine() -> str:
    """Digest of what numbers the processes that this one sees: a machine, or a container on it."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return digest_of([socket.gethostname(), space])
