"""What the processes of a job agree on before any of them needs torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .. import launch

T = TypeVar("T")


def agreed(make: Callable[[], T]) -> T:
    """`Ranks.agreed` of the job; a process that is alone just makes it."""
    if launch.count() == 1:
        return make()
    from ..runtime.ranks import of_job

    return of_job().agreed(make)
