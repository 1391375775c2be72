"""The stack that a thread's signal handlers run on (sigaltstack), kept from OpenVINO.

`compile_model` sets one of its own and unmaps it with the model, in whichever thread that ends.
Where this is another, the first one keeps the address, and the kernel ends the process at the next
signal (SIGSEGV) where it should have been asked to stop.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STACK_T = 64
"""Bytes that hold a stack_t of any system: two numbers and a pointer."""


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """After the block this thread has the signal stack that it had before, or none.

    Elsewhere than on Linux nothing is done.
    """
    if sys.platform != "linux":
        yield
        return
    exchange = ctypes.CDLL(None).sigaltstack
    before = ctypes.create_string_buffer(STACK_T)
    exchange(None, before)
    try:
        yield
    finally:
        exchange(before, None)
