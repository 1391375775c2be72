"""How far a run's stage is, in a file that whoever supervises it can read at any time.

`status.json` lies in the folder that a stage works in: the run directory, or a shard's own.

| key | what |
|---|---|
| state | running, done or failed |
| stage, what | the command, and the loop that it is in |
| done, total, unit | of that loop |
| seconds_left | of that loop, null where that is not known yet |
| pid, host | whose process it is |
| started, updated | seconds since 1970 |
| error | what ended it, where it failed |
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from .. import launch
from ..errors import ArtifactError, QncdError
from ..store.files import write_json
from ..store.lock import LOCK
from .watch import Watch

T = TypeVar("T")
STATUS = "status.json"
EVERY = 5.0
"""Seconds between two writings; larger: what is read is older."""


class _Status:
    def __init__(self, folder: Path, stage: str):
        self.path = folder / STATUS
        self.told: dict[str, Any] = {
            "state": "running",
            "stage": stage,
            "what": "preparing",
            "done": 0,
            "total": None,
            "unit": None,
            "seconds_left": None,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": round(time.time(), 1),
        }
        self._written = 0.0

    def tell(self, **what: Any) -> None:
        self.told |= what
        self._written = time.monotonic()
        with suppress(ArtifactError):  # no room for it, or nothing can be written there
            write_json(self.path, {**self.told, "updated": round(time.time(), 1)})

    def due(self) -> bool:
        return time.monotonic() - self._written >= EVERY


@contextmanager
def reported(folder: Path, stage: str, watch: Watch) -> Iterator[Watch]:
    """The watch for the block, whose progress is written to the folder's status.json too.

    Of a job, the first process writes.
    """
    if launch.rank() > 0:
        yield watch
        return
    status = _Status(folder, stage)
    status.tell()

    def track(
        items: Iterable[T], description: str, total: int, unit: str
    ) -> Generator[T, None, None]:
        begun = time.monotonic()
        for done, item in enumerate(watch.track(items, description, total, unit)):
            if status.due():
                left = (time.monotonic() - begun) / done * (total - done) if done else None
                status.tell(
                    what=description,
                    done=done,
                    total=total,
                    unit=unit,
                    seconds_left=None if left is None else round(left, 1),
                )
            yield item

    try:
        yield replace(watch, track=track)
    except BaseException as error:
        said = str(error) if isinstance(error, QncdError) else type(error).__name__
        status.tell(state="failed", error=said)
        if {path.name for path in folder.iterdir()} <= {STATUS, LOCK}:
            status.path.unlink(missing_ok=True)  # nothing has come of it
        raise
    status.tell(state="done", seconds_left=0.0)
