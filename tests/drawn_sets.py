"""What tests of whole runs look at: the files of a set of samples, and the line of a refusal."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Qncd


def images(folder: Path) -> dict[str, bytes]:
    """The files of a set's images by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def manifest(folder: Path) -> dict:
    """What a set says of itself."""
    return json.loads((folder / "manifest.json").read_text())


def refused(work: Qncd, *arguments: str) -> str:
    """The one line of a command that fails."""
    result = work(*arguments, ok=False)
    assert result.exit_code != 0 and result.stderr.count("\n") == 1, result.stderr
    return result.stderr
