"""What the caller of a stage hears while it works."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from ..lineage.freshness import State
from ..progress import Track, no_progress


def _unheard(*what: object) -> None:
    pass


Kept = str | Callable[[], str]
"""What is kept of interrupted work, for people: known beforehand, or asked for afterwards."""


def _uninterrupted(kept: Kept) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Watch:
    """Hooks of a caller; without them a stage works in silence.

    track: progress (progress.py); note: remarks, a line each; reason: the state of a stage before
    it runs, and whether it was forced; keeping: a context that knows what is kept of the work where
    it is interrupted; imported: called once everything large is imported.
    """

    track: Track = no_progress
    note: Callable[[str], None] = _unheard
    reason: Callable[[State | None, bool], object] = _unheard
    keeping: Callable[[Kept], AbstractContextManager[None]] = _uninterrupted
    imported: Callable[[], object] = _unheard


SILENT = Watch()
