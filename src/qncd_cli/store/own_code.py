"""Machine code and graphs in a run directory: only what this user has sealed is ever used.

A run directory may come from a stranger, or have a damaged file, and compiled code is run like the
package itself. So it is sealed by a key of the user's own, which lies outside all run directories:
HMAC-SHA256 over name and content (RFC 2104). What bears no such seal is taken for missing.

A sealed file is one line that says so, the seal, and the content; sealed folders keep theirs in a
file of their own.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ArtifactError
from .files import write_bytes
from .regular import open_regular
from .unfinished import unfinished_beside

HEAD = b"qncd sealed code 1\n"
SEAL = "sealed"
"""Name of the file that seals a folder."""
KEY_BYTES = 32
CHUNK = 1 << 20
_numbers = itertools.count()


def key_file() -> Path:
    """The user's key: 32 random bytes."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "qncd" / "key"


def own_folder() -> Path | None:
    """Where code that serves all run directories is kept, beside the key; None without a key.

    Raises ArtifactError for a key that others can read or write.
    """
    return None if _key() is None else key_file().parent


def seal(path: Path, content: bytes) -> None:
    """Write a file that `opened` takes. Nothing is written where the user can have no key.

    Raises ArtifactError where the place cannot be written.
    """
    if (mac := _mac(path.name)) is not None:
        mac.update(content)
        write_bytes(path, HEAD + mac.digest() + content)


def is_sealed(path: Path) -> bool:
    """Whether the file is there and was sealed by this user, under this very name."""
    return _copied(path, None)


@contextmanager
def opened(path: Path) -> Iterator[Path | None]:
    """The content of a sealed file, in a folder that nobody else can write to and that is gone
    after the block; None where it is missing or bears no seal of this user's.

    What is loaded there lives on. No two of these files have one name: the loader of libraries
    would take the second for the first.
    """
    if not path.exists():
        yield None
        return
    with _private_folder(path.parent) as folder:
        copy = folder / path.name
        with copy.open("xb") as file:
            good = _copied(path, file)
        yield copy if good else None


def seal_and_open(path: Path, content: bytes) -> AbstractContextManager[Path]:
    """Seal content that was just made, and open it: as it is, where there is no key.

    Raises ArtifactError where the place cannot be written.
    """
    seal(path, content)
    return _opened_content(path, content)


@contextmanager
def _opened_content(path: Path, content: bytes) -> Iterator[Path]:
    with _private_folder(path.parent) as folder:
        (folder / path.name).write_bytes(content)
        yield folder / path.name


def seal_folder(folder: Path) -> None:
    """Write the seal of all files in the folder. Raises ArtifactError."""
    mac = _mac_of_folder(folder)
    if mac is not None:
        write_bytes(folder / SEAL, mac)


def is_sealed_folder(folder: Path) -> bool:
    """Whether all files in the folder are those that this user sealed."""
    try:
        with open_regular(folder / SEAL) as file:
            said = file.read(2 * KEY_BYTES)
        mac = _mac_of_folder(folder)
    except OSError:
        return False
    return mac is not None and hmac.compare_digest(mac, said)


# ------------------------------------------------------------------ seals


def _mac(name: str) -> Any:
    """An HMAC that has taken in the name; the content follows. None without a key."""
    key = _key()
    return None if key is None else hmac.new(key, HEAD + os.fsencode(name) + b"\n", hashlib.sha256)


def _mac_of_folder(folder: Path) -> bytes | None:
    mac = _mac(folder.name)
    if mac is None:
        return None
    for path in sorted(folder.rglob("*")):
        if path.name == SEAL and path.parent == folder:
            continue
        name = os.fsencode(path.relative_to(folder))
        mac.update(len(name).to_bytes(8, "little") + name)
        if path.is_dir():
            continue
        with open_regular(path) as file:
            mac.update(hashlib.file_digest(file, "sha256").digest())
    return mac.digest()


def _copied(path: Path, copy: BinaryIO | None) -> bool:
    """Whether the seal holds; the content goes into the copy, whether it does or not."""
    try:
        with open_regular(path) as file:
            if file.read(len(HEAD)) != HEAD:
                return False
            said, mac = file.read(hashlib.sha256().digest_size), _mac(path.name)
            if mac is None:
                return False
            for chunk in _chunks(file):
                mac.update(chunk)
                if copy is not None:
                    copy.write(chunk)
    except OSError:
        return False
    return hmac.compare_digest(mac.digest(), said)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk


@contextmanager
def _private_folder(beside: Path) -> Iterator[Path]:
    """A folder of this user's alone, gone after the block; by a name that cannot be made to lead
    elsewhere, even where others may rename what is beside it."""
    with ExitStack() as block:
        try:
            place, _ = block.enter_context(unfinished_beside(beside / "code", _new_folder))
        except OSError:  # nothing can be written there
            place = Path(block.enter_context(tempfile.TemporaryDirectory(prefix="qncd-")))
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        block.callback(os.close, handle)
        held = Path(f"/proc/self/fd/{handle}")
        inner = (held if held.is_dir() else place) / f"{next(_numbers)}"
        inner.mkdir(mode=0o700)
        yield inner


def _new_folder(place: Path) -> None:
    place.mkdir(mode=0o700)


# ------------------------------------------------------------------ the key


def _key() -> bytes | None:
    """The user's key, made where it is missing; None where it cannot be kept.

    Raises ArtifactError for a key that others can read or write.
    """
    path = key_file()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = _read(path) or _read(_make(path))
    except OSError:
        return None
    return key


def _read(path: Path) -> bytes | None:
    """None where it is missing or damaged. Raises ArtifactError, OSError."""
    try:
        with open_regular(path) as file:
            for what in (path.parent.stat(), os.fstat(file.fileno())):
                if what.st_uid != os.geteuid() or stat.S_IMODE(what.st_mode) & 0o077:
                    raise ArtifactError(
                        f"{path}: others may read or write this key, or it is not yours",
                        f"remove {path.parent}; a new key is made, and code compiled anew",
                    )
            key = file.read(KEY_BYTES + 1)
    except FileNotFoundError:
        return None
    return key if len(key) == KEY_BYTES else None


def _make(path: Path) -> Path:
    """Make the key. Of two processes that do so at once, both take the first one's."""
    path.unlink(missing_ok=True)  # a damaged one
    with unfinished_beside(path, _new_private) as (temporary, _):
        temporary.write_bytes(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(temporary, path)
        except FileExistsError:
            return path
        except OSError:  # a file system without links
            os.replace(temporary, path)
    return path


def _new_private(place: Path) -> None:
    os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
