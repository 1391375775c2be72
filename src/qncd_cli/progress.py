"""Progress as stages report it, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")
Tick = Callable[[], None]


class Track(Protocol):
    """Wraps an iterable to show progress: track(items, description, total, unit).

    unit: what is counted, in the plural (calls, layers, images); total: how many there will be.
    """

    def __call__(
        self, items: Iterable[T], description: str, total: int, unit: str
    ) -> Generator[T, None, None]: ...


def no_progress(
    items: Iterable[T], description: str, total: int, unit: str
) -> Generator[T, None, None]:
    """The silent Track."""
    yield from items


def counted(
    track: Track, items: Iterable[T], description: str, total: int, unit: str
) -> Iterator[tuple[T, Tick]]:
    """Every item with a tick: progress counts the ticks, each one unit, and not the items.

    For loops whose units pass inside of calls. Ticks beyond the total are taken without complaint.
    """
    ticks = track(range(total), description, total, unit)
    next(ticks, None)  # shown from now on, at nothing done

    def tick() -> None:
        next(ticks, None)

    try:
        for item in items:
            yield item, tick
    finally:
        ticks.close()
