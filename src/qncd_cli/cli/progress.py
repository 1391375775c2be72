"""Progress on stderr: bars with the time left at a terminal, a plain line now and then elsewhere.

Loops that end within BRIEF seconds leave nothing behind. Without a terminal, a longer loop says so
after BRIEF seconds and when it has ended; in between it gives a line every EVERY seconds.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
BRIEF, EVERY = 2.0, 30.0
WIDE = 80
"""Columns of a terminal with room for the bar itself."""


class Bars:
    """Bars at a terminal; a loop inside of another one has its bar below."""

    def __init__(self) -> None:
        self._shown: Any = None

    def track(
        self, items: Iterable[T], description: str, total: int, unit: str
    ) -> Generator[T, None, None]:
        outermost = self._shown is None
        progress = self._shown = self._shown or _progress()
        if outermost:
            atexit.register(progress.stop)  # an error or Ctrl-C leaves no bar and a cursor behind
            progress.start()
        task = progress.add_task(description, total=total, unit=unit)
        start = time.monotonic()
        try:
            for item in items:
                yield item
                progress.advance(task)
        finally:
            brief = time.monotonic() - start < BRIEF
            if brief or not outermost:
                progress.remove_task(task)
            if outermost:
                progress.live.transient = brief
                progress.stop()
                atexit.unregister(progress.stop)
                self._shown = None


def _progress() -> Any:
    """A `rich.progress.Progress` for this terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
    ]
    if console.width >= WIDE:
        columns.insert(1, BarColumn(min(40, console.width - 66)))
        columns.append(TimeElapsedColumn())
    columns += [TimeRemainingColumn(), TextColumn("left")]
    # what is printed meanwhile stays where it belongs: data on stdout
    return Progress(*columns, console=console, redirect_stdout=False)


def lines(
    items: Iterable[T],
    description: str,
    total: int,
    unit: str,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Generator[T, None, None]:
    """The items, with a line now and then; say: receives each; clock: seconds."""
    start = clock()
    begun = None  # when the first item was there: what it waited for says nothing of the rest
    said = None  # when the last line was said
    done = 0
    for item in items:
        begun = clock() if begun is None else begun
        yield item
        done += 1
        now = clock()
        if done == total:
            continue
        if now - start >= BRIEF if said is None else now - said >= EVERY:
            left = (now - begun) / done * (total - done)
            say(f"{description}: {done} of {total} {unit}, about {duration(left)} left")
            said = now
    if clock() - start >= BRIEF:
        say(f"{description}: {done} {unit} in {duration(clock() - start)}")


def duration(seconds: float) -> str:
    """A length of time as a person says it: 4 s, 12 min, 3 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
