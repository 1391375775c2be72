"""Files that scripts write from the code: written, or with --check compared with what is there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def main(description: str | None, written: Callable[[], Mapping[Path, str]]) -> None:
    """Write the files, or exit with 1 and the names of those that --check finds different.

    description: a script's docstring; written: gives the text of every file by its path.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where one is old")
    check = parser.parse_args().check
    old = {path: text for path, text in written().items() if not holds(path, text)}
    if check and old:
        names = ", ".join(str(path.relative_to(ROOT)) for path in old)
        sys.exit(f'out of date: {names}; run "make docs"')
    for path, text in old.items():
        path.write_text(text, encoding="utf-8")


def holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text
