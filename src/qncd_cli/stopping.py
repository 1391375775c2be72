"""Whether the process was asked to stop, and what long work has to do with it.

Signals come at any time. Work that consists of small pieces asks to be let finish the one it is
at; it looks at `wanted` after each, writes down what it has, and stops by `check`. The command
line receives the signals (cli/process.py); elsewhere nothing is ever wanted.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


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
    """Within the block, work that looks at `wanted` is not stopped at once."""
    _request.finishing += 1
    try:
        yield
    finally:
        _request.finishing -= 1


def request(number: int) -> bool:
    """Ask to stop; whether there is something that will. Raises Stopped where there is nothing, or
    when it is asked a second time."""
    if _request.finishing == 0 or _request.number is not None:
        raise Stopped(number)
    _request.number = number
    return True


def wanted() -> bool:
    """Whether to stop after the piece of work at hand."""
    return _request.number is not None


def check() -> None:
    """Raises Stopped where that is wanted."""
    if _request.number is not None:
        raise Stopped(_request.number)
