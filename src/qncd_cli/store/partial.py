"""Partial results: what a stage has done so far, kept so that a killed one goes on from there.

A stage is cut into pieces, each a function of what the stage is made from alone: what a call of
the denoiser returned, the codes of a layer. Pieces that are finished are written now and then to a
folder of the run, and found there by their names when the stage starts again:

| in partial/STAGE | what |
|---|---|
| 00000.safetensors, ... | pieces, those that were finished since the file before |
| NAME.safetensors | a state that grows with every piece: the last one replaces the others |
| scratch/ | files of the stage's own that nobody goes on with |

The files are artifacts of the kind `partial`: a damaged one is left out. Each says what it was
made from; a folder made from anything else is not gone on with.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from .. import stopping
from ..errors import ArtifactError, ConfigError, ModelError
from . import artifacts
from .artifacts import Artifact
from .digests import differing, digest_of
from .partial_folder import discard

EVERY = 0.3
"""Seconds between two writings, at least; larger: more is lost when the process is killed, which
counts for stages of seconds."""
LAG, LONGEST = 0.01, 60.0
"""Share of the time since the stage began that may pass between two writings, and seconds of it at
most; less: long stages, which can lose more, write more files."""
SHARE = 0.05
"""Most of the time that writing may take; less: large pieces are written more rarely."""
SCRATCH = "scratch"
NAMES = {"code": "the code of qncd", "model": "the model's files"}
"""Keys of what a stage is made from, as people know them."""


@dataclass(frozen=True)
class Piece:
    """value: as JSON has it; tensors: by name, in the order of memory that they are read back in:
    sums over another order have other last bits."""

    value: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.contiguous()


States = Mapping[str, Callable[[], Piece]]
"""States by name, and what tells the present one."""


class Partial:
    """The pieces of one stage; within a `with` block they are read, written and gone on with.

    folder: where they are, None keeps nothing. made_from: everything that decides them, as JSON
    has it. tell: receives a line about what could not be gone on with.
    """

    def __init__(
        self,
        folder: Path | None,
        made_from: Mapping[str, Any],
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder, self.made_from, self._tell, self._clock = folder, made_from, tell, clock
        self._found: dict[str, Piece] = {}
        self._pending: dict[str, Piece] = {}
        self._files: dict[Path, set[str]] = {}
        self._number = 0
        self._begun = self._written = clock()
        self._cost = 0.0
        self._block = ExitStack()

    def __enter__(self) -> Partial:
        if self.folder is not None:
            self._read(self.folder)
            self._begun = self._written = self._clock()
            self._block.enter_context(stopping.finishing())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._block.close()
        if kind is None or issubclass(kind, ConfigError | ModelError):
            return  # it would fail again
        try:
            self._write_pieces()
        except ArtifactError:
            return  # no room for it; why the stage ended is what is told

    # -------------------------------------------------------------- pieces

    def has(self, key: str) -> bool:
        """Whether a piece was found and not taken yet."""
        return key in self._found

    def take(self, key: str) -> Piece | None:
        """The piece as it was found, once; None where it has to be made."""
        return self._found.pop(key, None)

    def piece(self, key: str, make: Callable[[], Piece]) -> Piece:
        """The piece as it was found, or made now and kept."""
        found = self.take(key)
        if found is None:
            found = make()
            self.keep(key, found)
        return found

    def keep(self, key: str, piece: Piece, states: States | None = None) -> None:
        """Keep a finished piece, and once it is time write all that are. states: written with it.

        Raises Stopped where the process was asked to stop, all written; ArtifactError where nothing
        can be written.
        """
        if self.folder is None:
            return
        copies = {n: t.detach().to("cpu", copy=True) for n, t in piece.tensors.items()}
        self._pending[key] = Piece(piece.value, copies)
        self.keep_states(states)

    def keep_states(self, states: States | None) -> None:
        """Write states, and before them all finished pieces, once it is time. Raises as `keep`."""
        if self.folder is not None and (self._due() or stopping.wanted()):
            self.write(states)
            stopping.check()

    def _due(self) -> bool:
        now = self._clock()
        lag = min(LONGEST, LAG * (now - self._begun))
        return now - self._written >= max(EVERY, lag, self._cost / SHARE)

    def write(self, states: States | None = None) -> None:
        """Write what is finished. A killed process loses a state rather than pieces before it."""
        if self.folder is None:
            return
        begun = self._clock()
        self._write_pieces()
        for name, state in (states or {}).items():
            self._write(f"{name}.safetensors", {name: state()})
        self._written = self._clock()
        self._cost = self._written - begun

    def forget(self, *beginnings: str) -> None:
        """Pieces and states whose names begin so are needed no more. Others are written first."""
        self._write_pieces()
        for key in [key for key in self._found if key.startswith(beginnings)]:
            del self._found[key]
        for path, keys in list(self._files.items()):
            keys -= {key for key in keys if key.startswith(beginnings)}
            if not keys:
                path.unlink(missing_ok=True)
                del self._files[path]

    def remove(self) -> None:
        """The stage's results are written: nothing partial is needed any more."""
        if self.folder is not None:
            self._pending.clear()
            discard(self.folder)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for files of the stage's own, gone after the block."""
        if self.folder is not None:
            (self.folder / SCRATCH).mkdir(parents=True, exist_ok=True)
        parent = None if self.folder is None else self.folder / SCRATCH
        with tempfile.TemporaryDirectory(prefix="qncd-", dir=parent) as name:
            yield Path(name)

    # -------------------------------------------------------------- files

    def _read(self, folder: Path) -> None:
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        for path in sorted(folder.glob("*.safetensors")):
            try:
                artifact = artifacts.read(path, "partial")
            except ArtifactError as error:
                self._tell(f"{error.message}: what it held is made again")
                path.unlink(missing_ok=True)
                continue
            if artifact.body["made_from"] != self.made_from:
                other = differing(artifact.body["made_from"], self.made_from, NAMES)
                self._tell(f"{folder}: not gone on with, begun again ({'; '.join(other)})")
                discard(folder)
                self._found.clear()
                self._files.clear()
                return
            pieces = artifact.body["pieces"]
            self._files[path] = set(pieces)
            for key, described in pieces.items():
                tensors = {name: artifact.tensors[f"{key}/{name}"] for name in described["tensors"]}
                self._found[key] = Piece(described["value"], tensors)
            if path.stem.isdecimal():
                self._number = int(path.stem) + 1

    def _write_pieces(self) -> None:
        if self._pending:
            self._write(f"{self._number:05d}.safetensors", self._pending)
            self._number += 1
            self._pending = {}

    def _write(self, name: str, pieces: Mapping[str, Piece]) -> None:
        assert self.folder is not None
        body = {
            "made_from": dict(self.made_from),
            "pieces": {
                key: {
                    "value": piece.value,
                    "tensors": {n: [str(t.dtype), list(t.shape)] for n, t in piece.tensors.items()},
                }
                for key, piece in pieces.items()
            },
        }
        tensors = {f"{key}/{n}": t for key, p in pieces.items() for n, t in p.tensors.items()}
        config, model = digest_of(self.made_from), str(self.made_from.get("model", ""))
        path = self.folder / name
        artifacts.write(path, Artifact("partial", tensors, body, config, model))
        self._files[path] = set(pieces)


NOTHING_KEPT = Partial(None, {}, lambda line: None)
"""Keeps nothing, for stages that are called by themselves."""
