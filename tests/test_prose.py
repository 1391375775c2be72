"""Docstrings: the first line stands alone as an English sentence or noun phrase."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "qncd_cli"
FRAGMENT = re.compile(r'^\s*[rf]?"""(Of|As|Whose|By|That|Part of) .*', re.MULTILINE)
"""Beginnings of a first line that only makes sense after the name above it."""


def fragments(text: str) -> list[str]:
    return [found.group().strip() for found in FRAGMENT.finditer(text)]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.name)
def test_first_lines_stand_alone(path):
    assert fragments(path.read_text(encoding="utf-8")) == []


def test_a_fragment_is_found():
    assert fragments('X = 1\n"""Of the file."""\n') == ['"""Of the file."""']
    assert fragments('def f():\n    """Whose sum is 1."""\n') != []
    assert fragments('"""A sum of the file."""') == []
