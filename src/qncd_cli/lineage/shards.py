"""Shards of a sample set: what each of several processes draws that know nothing of each other.

| path beside the set NAME | what |
|---|---|
| NAME.shards/2-of-4/ | the second of four, a set by itself that goes on as any other does |

Shards end where batches end, so that every sample is drawn in the batch that it has in the whole.
Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

SHARD = "shard"
"""Key of a shard's manifest."""


@dataclass(frozen=True)
class Shard:
    """Number `index`, from 1, of `count` shards of the seeds `whole`."""

    index: int
    count: int
    whole: range

    @property
    def label(self) -> str:
        return f"{self.index}/{self.count}"

    def seeds(self, batch_size: int) -> range:
        """What it draws; none where there are more shards than batches."""
        batches = -(-len(self.whole) // batch_size)
        first, last = (batches * i // self.count * batch_size for i in (self.index - 1, self.index))
        return self.whole[first:last]

    def folder(self, of_set: Path) -> Path:
        return shards_folder(of_set) / f"{self.index}-of-{self.count}"

    def described(self) -> dict[str, int]:
        """The same for JSON."""
        return {
            "index": self.index,
            "count": self.count,
            "first_seed": self.whole.start,
            "num": len(self.whole),
        }

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> Shard | None:
        """The shard that a manifest is of, None where that is damaged."""
        found = manifest.get(SHARD)
        keys = ("index", "count", "first_seed", "num")
        if not isinstance(found, dict) or not all(type(found.get(k)) is int for k in keys):
            return None
        first = found["first_seed"]
        return cls(found["index"], found["count"], range(first, first + found["num"]))


def parse_shard(text: str) -> tuple[int, int]:
    """2/4 -> (2, 4). Raises ConfigError."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    index, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= count:
        raise ConfigError(
            f"--shard {text}: not one of a number of shards", "write for instance 2/4, from 1/4 on"
        )
    return index, count


def shards_folder(of_set: Path) -> Path:
    """Where the shards of a set are."""
    return of_set.with_name(f"{of_set.name}.shards")


def shard_folders(of_set: Path) -> Iterator[Path]:
    """Folders of the shards that are there, by their numbers."""
    found = []
    for path in shards_folder(of_set).glob("*-of-*"):
        index, _, count = path.name.partition("-of-")
        if index.isdecimal() and count.isdecimal() and path.is_dir():
            found.append((int(count), int(index), path))
    return (path for _, _, path in sorted(found))
