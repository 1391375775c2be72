"""Tuned tiles: which shipped tile multiplies a shape fastest, timed once on its GPU and kept.

Only products of bytes are tuned. Their sums are integers, the same whatever the tile; sums of
floats are rounded in the order of their tile, so that those take theirs by arithmetic
(`tiles.choose_tile`). The table is the user's, in the cache folder, one file for a kind of GPU and
a version of Triton. Whatever in it cannot be read, or is no tile of today's, is timed again; where
it cannot be written, every process times for itself.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from ...errors import ArtifactError
from ...store.file_stamps import cache_folder
from ...store.files import read_json, write_json
from .launch import Call, launch_time
from .tiles import Tile

WARMUP, REPEATS = 5, 20
"""Milliseconds of launches before those that count, and of those. More: steadier, and a longer
first call of every shape."""

Timer = Callable[[Tile], float]


@dataclass
class TileTable:
    """Fastest tiles by shape of product. path: of the file."""

    path: Path
    _found: dict[str, list[int]] = field(default_factory=dict)
    _read: bool = False

    def fastest(self, shape: str, tiles: Sequence[Tile], seconds: Timer) -> Tile:
        """The one of tiles that takes least, as it is known or by the timer, and kept then."""
        if not self._read:
            self._found, self._read = self._on_disk(), True
        known = self._found.get(shape)
        for tile in tiles:
            if known == [*astuple(tile)]:
                return tile
        tile = min(tiles, key=seconds)
        self._found = {**self._on_disk(), **self._found, shape: [*astuple(tile)]}
        with suppress(ArtifactError):
            write_json(self.path, self._found)
        return tile

    def _on_disk(self) -> dict[str, list[int]]:
        try:
            found = read_json(self.path, "qncd sample")
        except ArtifactError:
            return {}
        return found if isinstance(found, dict) else {}


def can_time(device: torch.device) -> bool:
    """Whether launches can be timed now: on a GPU, unless a graph of launches is being recorded."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


@functools.cache
def table_of(device: torch.device) -> TileTable:
    """The table of a GPU."""
    name = torch.cuda.get_device_name(device)
    return table_for(name, version("triton"))


def table_for(gpu: str, triton: str) -> TileTable:
    """The table of a kind of GPU and a version of Triton, by their names."""
    words = "-".join(re.findall(r"[A-Za-z0-9.]+", f"{gpu} triton {triton}"))
    return TileTable(cache_folder() / "tiles" / f"{words}.json")


def milliseconds(call: Call, device: torch.device) -> float:
    """Time of a launch on a GPU, the median of many."""
    return launch_time(call, device, WARMUP, REPEATS)
