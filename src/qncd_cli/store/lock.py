"""One process at a time writes to a folder; a dead one's lock is free.

The lock is the system's own (flock) on a file `.lock`, which says who holds it and is gone when
nobody does. Where a file system has no such locks, or nothing can be written, there is none.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Within the block, no other process is in such a block for the folder, which is made.

    Waits for one that is; tell: receives a line that says who it is. A folder that had to be made
    and holds nothing afterwards is removed.
    """
    made = _make(folder)
    handle = _acquire(folder, tell)
    try:
        yield
    finally:
        _release(folder, handle)
        for path in made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def locked_if_free(folder: Path) -> Iterator[bool]:
    """`locked` where no other process is in such a block, and whether that is so."""
    try:
        handle = _acquire(folder, None)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        _release(folder, handle)


def _make(folder: Path) -> list[Path]:
    """Make the folder; those that were not there, the deepest first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with suppress(OSError):  # whoever writes there says why that cannot be
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _acquire(folder: Path, tell: Callable[[str], None] | None) -> int | None:
    """A handle that holds the lock, None where there are none. tell: None not to wait."""
    path = folder / LOCK
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            return None
        try:
            _flock(handle, folder, tell)
            if _is_same(handle, path):  # else its holder has removed it meanwhile
                os.ftruncate(handle, 0)
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"
                os.write(handle, holder.encode())
                return handle
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError as error:
            os.close(handle)
            if error.errno in (*_UNSUPPORTED, errno.ENOSPC, errno.EDQUOT):
                return None
            raise
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _flock(handle: int, folder: Path, tell: Callable[[str], None] | None) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if tell is None:
            raise
        holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
        tell(f"{folder}: in use by {holder}, waiting until it has ended")
        fcntl.flock(handle, fcntl.LOCK_EX)


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _release(folder: Path, handle: int | None) -> None:
    if handle is None:
        return
    with suppress(OSError):
        (folder / LOCK).unlink()
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)
