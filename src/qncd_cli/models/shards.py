"""Files that one file was split into: model-00001-of-00003.safetensors and its fellows."""

from __future__ import annotations

import re
from pathlib import Path

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.[a-z]+)")


def shards_of(file: str) -> list[Path]:
    """All shards of the file that one of them is of, there or not; a whole file alone."""
    path = Path(file)
    found = _SHARD.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    names = (
        f"{found['stem']}-{number:05d}-of-{found['count']}{found['ending']}"
        for number in range(1, count + 1)
    )
    return [path.with_name(name) for name in names]
