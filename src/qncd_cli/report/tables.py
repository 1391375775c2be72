"""Tables as Markdown, and values as text; without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..vocabulary import is_number, number


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table of the named columns; a column of numbers is aligned right.

    A key that a row lacks reads as None. Ends with a newline.
    """
    right = [all(is_number(row.get(name)) for row in rows) for name in columns]
    lines = [list(columns), ["---:" if numeric else "---" for numeric in right]]
    lines += [[plain(row.get(name)) for name in columns] for row in rows]
    return "".join("| " + " | ".join(map(_markdown_cell, line)) + " |\n" for line in lines)


def plain(value: Any) -> str:
    """Any JSON value as text."""
    if value is None or isinstance(value, int | float):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _markdown_cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
