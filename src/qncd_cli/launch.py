"""How the process was launched: alone, or as one rank of a job that torchrun began."""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process among those of the job, 0 where it is alone."""
    return _number("RANK", 0)


def count() -> int:
    """How many processes the job has."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process on its machine."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else otherwise
