"""Latents of a sample set on disk: read in rows, and joined without being held all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..store.artifact_files import Stored, read_stored
from ..store.artifacts import Artifact
from ..store.streamed import Streamed, read_rows, write_streamed
from .sample_sets import PIXELS, TRACED

BY_SEED = {
    "seeds": ("seeds", "latents", "classes"),
    "prediction_seeds": ("prediction_seeds", "predictions"),
}
"""The tensor that holds seeds -> those whose rows follow it."""
ROWS = 64
"""Rows that are read at once; larger: more memory, fewer reads."""


@dataclass(frozen=True)
class Latents:
    """Samples in one file, some of which may be left out.

    stored: the file, checked; left_out: seeds that count as missing.
    """

    stored: Stored
    left_out: frozenset[int] = frozenset()

    @classmethod
    def open(cls, path: Path) -> Latents:
        """Raises ArtifactError where it is missing or damaged."""
        return cls(read_stored(path, "latents"))

    @property
    def body(self) -> dict[str, Any]:
        return self.stored.body

    def without(self, seeds: set[int]) -> Latents:
        return replace(self, left_out=self.left_out | seeds) if seeds else self

    @property
    def seeds(self) -> list[int]:
        """In ascending order."""
        return list(self.row_of)

    def rows(self, key: str) -> dict[int, int]:
        """Seed -> row; key: of BY_SEED."""
        found = self.tensor(key).tolist()
        return {seed: row for row, seed in enumerate(found) if seed not in self.left_out}

    def pixels(self) -> dict[int, str] | None:
        """Seed -> the digest of its image's colours; None where the file does not know them."""
        known = self.body.get(PIXELS)
        return None if known is None else {seed: known[row] for seed, row in self.row_of.items()}

    def tensor(self, name: str, rows: slice = slice(None)) -> Tensor:
        return read_rows(self.stored.path, name, rows)

    def of(self, seeds: Sequence[int]) -> Tensor:
        """Latents of these seeds, which are there, in their order."""
        return torch.cat([self.tensor("latents", rows) for rows in _slices(self.row_of, seeds)])

    @cached_property
    def row_of(self) -> dict[int, int]:
        """Seed -> row."""
        return self.rows("seeds")

    def predictions(self, seeds: Sequence[int]) -> Tensor:
        """The predictions of traced seeds."""
        row_of = self.rows("prediction_seeds")
        return torch.cat([self.tensor("predictions", rows) for rows in _slices(row_of, seeds)])


def join(path: Path, pieces: Sequence[Latents]) -> Artifact:
    """Write one latents artifact, ordered by seed, each seed once (the later piece wins).

    At least one piece; `path` itself may be among them. Predictions are kept of the first TRACED
    seeds, in whatever order they were drawn.
    """
    body = {
        **pieces[0].body,
        "extra_calls": max(piece.body["extra_calls"] for piece in pieces),
    }
    known = [piece.pixels() for piece in pieces]
    body.pop(PIXELS, None)
    if all(pixels is not None for pixels in known):
        pixels = {seed: digest for found in known for seed, digest in (found or {}).items()}
        body[PIXELS] = [pixels[seed] for seed in sorted(pixels)]
    tensors = {}
    first = sorted(set().union(*(piece.row_of for piece in pieces)))[:TRACED]
    for key, count in (("seeds", "count"), ("prediction_seeds", "traced")):
        place = {
            seed: (number, row)
            for number, piece in enumerate(pieces)
            for seed, row in piece.rows(key).items()
        }
        kept = place if key == "seeds" else place.keys() & {*first}
        order = [place[seed] for seed in sorted(kept)]
        body[count] = len(order)
        for name in BY_SEED[key]:
            type_, shape = pieces[0].stored.tensors[name]
            rows = partial(_pieces, pieces, name, order)
            tensors[name] = Streamed(type_, (len(order), *shape[1:]), rows)
    model = pieces[0].stored.model
    return write_streamed(path, Artifact("latents", {}, body, "", model), tensors)


def _pieces(
    pieces: Sequence[Latents], name: str, order: Sequence[tuple[int, int]]
) -> Iterator[Tensor]:
    """Rows of a tensor in the given order, neighbours together."""
    for number, rows in _runs(order):
        yield pieces[number].tensor(name, rows)


def _runs(order: Sequence[tuple[int, int]]) -> Iterator[tuple[int, slice]]:
    start = 0
    for end in range(1, len(order) + 1):
        (number, first), length = order[start], end - start
        if end == len(order) or order[end] != (number, first + length) or length == ROWS:
            yield number, slice(first, first + length)
            start = end


def _slices(row_of: dict[int, int], seeds: Sequence[int]) -> Iterator[slice]:
    return (rows for _, rows in _runs([(0, row_of[seed]) for seed in seeds]))
