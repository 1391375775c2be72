"""What large files are worth being read for once: digests, remembered by the files' stamps.

A stamp is path, size, time of the last change and inode. What is remembered lies in the user's
cache folder; where that cannot be written, nothing is remembered. Small files are always read.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import ArtifactError
from .digests import digest_of
from .files import write_bytes

LARGE = 1 << 26
"""Bytes of all files together from which reading takes longer than anyone should wait twice."""
SETTLED = 2.0
"""Seconds since the last change before a stamp says that nothing has changed: clocks are coarse."""


def cache_folder() -> Path:
    """The user's cache folder of this package: QNCD_CACHE, else that of the system."""
    if own := os.environ.get("QNCD_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qncd"


def remembered(what: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """compute(), a hexadecimal digest of the files' content, or what it was for the same stamps.

    what: names the kind of digest.
    """
    before = _stamps(files)
    if before is None or sum(size for _, size, _, _ in before) < LARGE:
        return compute()
    place = cache_folder() / "digests" / digest_of([what, before])
    try:
        known = place.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        known = ""
    if re.fullmatch(r"[0-9a-f]{16,64}", known):
        return known
    computed = compute()
    newest = max(changed for _, _, changed, _ in before) / 1e9
    if _stamps(files) == before and time.time() - newest > SETTLED:
        try:
            write_bytes(place, computed.encode())
        except ArtifactError:
            return computed
    return computed


def _stamps(files: Sequence[Path]) -> list[tuple[str, int, int, int]] | None:
    """None where a file cannot be looked at."""
    try:
        found = [(os.path.realpath(path), path.stat()) for path in files]
    except OSError:
        return None
    return [(place, s.st_size, s.st_mtime_ns, s.st_ino) for place, s in found]
