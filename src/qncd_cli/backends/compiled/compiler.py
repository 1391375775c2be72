"""Where compilers write: beside the code that comes of it, and nothing is left there.

torch and g++ use the system's temporary folder, under names that others know beforehand, and a
killed process leaves everything there.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ...errors import ArtifactError
from ...store.unfinished import unfinished_beside

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Variable that names the folder of torch's compiler; where it is set, that one is taken."""


@contextmanager
def compiling(folder: Path) -> Iterator[None]:
    """Within the block, what compilers need for a while lies in a private folder in `folder`.

    What torch keeps between two compilations stays there until the process ends. What a killed
    process left goes with the next one. Raises ArtifactError where nothing can be written.
    """
    with ExitStack() as block:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            place = _private_folder(block, folder)
            if CACHE not in os.environ:
                until_the_end = ExitStack()
                os.environ[CACHE] = str(_private_folder(until_the_end, folder))
                atexit.register(until_the_end.close)
            _settle_headers(os.environ[CACHE])
        except OSError as error:
            raise ArtifactError(
                f"{folder}: cannot be written: {error.strerror or error}",
                "is there space, and may you write there?",
            ) from error
        block.enter_context(_temporaries_in(str(place)))
        yield


def _settle_headers(folder: str) -> None:
    """Have torch keep its compiled headers in a folder that outlasts the block.

    It takes the temporary folder of the moment in which this module is imported first, and keeps
    the headers' paths until the process ends: a second compilation would look for them in vain.
    """
    with _temporaries_in(folder):
        import torch._inductor.codecache  # noqa: F401


@contextmanager
def _temporaries_in(folder: str) -> Iterator[None]:
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        with environment("TMPDIR", folder):
            yield
    finally:
        tempfile.tempdir = before


def _private_folder(block: ExitStack, folder: Path) -> Path:
    place, _ = block.enter_context(
        unfinished_beside(folder / "code", lambda place: place.mkdir(mode=0o700))
    )
    return place.absolute()


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Within the block, a variable has that value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
