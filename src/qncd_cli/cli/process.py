"""A command as a process of its own: what torch and diffusers make slow about beginning and ending.

They bring very many objects that stay until the end. The collector of reference cycles looks
through all of them again and again while they are imported, and the interpreter takes them apart
one by one before it leaves: a good part of a short command
(docs/notebook/2026-11-23-packaged-models-speed.md).
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from .. import stopping
from ..errors import EXIT_SIGNAL

RARELY = 1000
"""Collections of the middle generation before one of all objects; usually 10."""
KEPT_MEMORY = 160 * 2**20
"""Bytes: tensors of up to so many are made of memory that the process has, and so much of it stays
when it is free. By itself glibc asks for new pages at every tensor of more than 32 MB, which the
system first fills with zeros (docs/notebook/2026-11-28-memory-kept.md). 128 channels of a decoder's
512 x 512 have just 128 MiB (docs/notebook/2026-11-29-decoder-again.md)."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of mallopt's options in glibc's malloc.h."""
_usual = gc.get_threshold()
_imported = time.perf_counter()
_alone = False


def begun() -> float:
    """When the command began, on the clock of time.perf_counter: with the process, where that runs
    no other."""
    return _imported if _alone else time.perf_counter()


def receive_signals() -> None:
    """Ctrl-C, SIGTERM and SIGHUP stop the process, unless it was started to ignore them: as nohup
    and shells do."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _received)


def _received(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            # half imported, libraries swallow what is raised, or tell it in a hundred lines
            os.write(2, b"Interrupted.\n")
            os._exit(EXIT_SIGNAL + number)
        frame = frame.f_back
    stopping.request(number)


def run_alone(command: Callable[[], object]) -> None:
    """Run a command that ends with SystemExit, and end the process with its code.

    Handlers of `atexit` run as always; the interpreter's own teardown after them is skipped.
    Where the command ends in another way, so does the process.
    """
    global _alone
    _alone = True
    _quiet_libraries()
    keep_freed_memory()
    code: list[int] = []
    atexit.register(_leave, code)  # the first to be registered is the last to be called
    gc.set_threshold(*_usual[:2], RARELY)
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, int):
            code.append(end.code)
        raise


def _quiet_libraries() -> None:
    """Warnings of torch, diffusers and others are for those who write programs: what they mean for
    a command is said by its own lines. With --debug, or python's -W, they are heard."""
    if "--debug" in sys.argv or sys.warnoptions:
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def keep_freed_memory() -> None:
    """Let glibc hand freed memory to the next tensor, unless the environment says what it does."""
    told = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if told or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if sys.platform != "linux":
        return
    choose = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if choose is not None:
        choose(_MMAP_THRESHOLD, KEPT_MEMORY)
        choose(_TRIM_THRESHOLD, KEPT_MEMORY)


def collect_as_usual() -> None:
    """Collect garbage as usual from here on; called once everything large is imported.

    In a process of its own, the collector never looks again at what is there by now.
    """
    if gc.get_threshold()[2] == RARELY:
        gc.freeze()
        gc.set_threshold(*_usual)


def _leave(code: list[int]) -> None:
    if code:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError):  # closed, or full, which was told
                stream.flush()
        os._exit(code[0])
