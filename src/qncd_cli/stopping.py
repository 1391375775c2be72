"""Whether the process was asked to stop, and what long work has to do with it.

Signals come at any time. Work that consists of small pieces asks to be let finish the one it is
at; it looks at `wanted` after each, writes down what it has, and stops by `check`. The command
line receives the signals (cli/process.py); elsewhere nothing is ever wanted.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

GRACE = 5.0
"""Seconds that a piece of work has to end; schedulers kill 10 to 30 s after they asked."""


class Stopped(KeyboardInterrupt):
    """The process was asked to stop. number: of the signal."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Request:
    """number: of the signal that came while something was to be finished; finishing: how many
    blocks are."""

    number: int | None = None
    finishing = 0


_request = _Request()


@contextmanager
def finishing() -> Iterator[None]:
    """Within the block, work that looks at `wanted` is stopped after GRACE at the latest."""
    _request.finishing += 1
    try:
        yield
    finally:
        _request.finishing -= 1
        _in_time()


def request(number: int) -> None:
    """Ask to stop. Raises Stopped where nothing is to be finished, or it is asked a second time;
    else that is raised once the time is up."""
    if _request.finishing == 0 or _request.number is not None:
        _in_time()
        raise Stopped(number)
    _request.number = number
    signal.signal(signal.SIGALRM, lambda *_: check())
    signal.setitimer(signal.ITIMER_REAL, GRACE)


def wanted() -> bool:
    """Whether to stop now that a piece of work has ended; what is done may be written first."""
    if _request.number is None:
        return False
    _in_time()
    return True


def _in_time() -> None:
    """The work has ended, or nothing will wait for it."""
    if _request.number is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def check() -> None:
    """Raises Stopped where that is wanted."""
    if _request.number is not None:
        raise Stopped(_request.number)
