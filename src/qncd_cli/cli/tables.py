"""Tables that fit a terminal of any width without cutting a name or a number.

What does not fit as it is gets its long texts wrapped; few rows become columns; else the columns
are spread over several tables, each with the first one; and what is too wide even for that is
printed row by row, as a block of lines.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TextIO

TEXT = 24
"""Characters from which on a cell is a text, that may be wrapped, and not a name or a number."""
LINES = 8
"""Lines of a wrapped cell, at most; longer cells are not readable beside each other."""
TURNED = 6
"""Rows that become columns where they fit so."""


@dataclass(frozen=True)
class Grid:
    """Cells as text. right: of each column, whether it stands to the right; the first `keys`
    columns say what a row is and are repeated where columns are spread over several tables."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[bool]
    keys: int = 1

    def taken(self, columns: Sequence[int]) -> Grid:
        """These columns alone."""
        return replace(
            self,
            columns=[self.columns[i] for i in columns],
            rows=[[row[i] for i in columns] for row in self.rows],
            right=[self.right[i] for i in columns],
        )

    def turned(self) -> Grid:
        """Rows as columns: the first cell of each is its heading."""
        names = [row[0] for row in self.rows]
        rows = [
            [column, *(row[i] for row in self.rows)]
            for i, column in enumerate(self.columns)
            if i > 0
        ]
        right = [False, *[any(self.right)] * len(names)]
        return Grid([self.columns[0], *names], rows, right)


def widths(grid: Grid, width: int) -> list[int] | None:
    """Characters for each column, in a table at most so wide; None where it cannot be.

    Headings break at spaces, texts as well, into at most LINES lines; names and numbers never.
    """
    cells = [[column, *(row[i] for row in grid.rows)] for i, column in enumerate(grid.columns)]
    natural = [max(map(len, column)) for column in cells]
    found = [
        max(_unbroken(column[0], 1), *(_unbroken(c, TEXT) for c in column)) for column in cells
    ]
    spare = width - sum(found) - 3 * len(found) - 1
    if spare < 0:
        return None
    for _ in range(spare):
        short = [i for i in range(len(found)) if found[i] < natural[i]]
        if not short:
            break
        found[max(short, key=lambda i: natural[i] / found[i])] += 1
    lines = (
        len(textwrap.wrap(c, w)) for column, w in zip(cells, found, strict=True) for c in column
    )
    return None if max(lines, default=0) > LINES else found


def _unbroken(text: str, least: int) -> int:
    """Characters that must stand side by side: all of a short text, the longest word of others."""
    longest = max(map(len, text.split()), default=0)
    return len(text) if len(text) <= least else max(longest, least)


def arranged(grid: Grid, width: int) -> list[Grid] | None:
    """The tables that a grid becomes at this width; None where it takes blocks."""
    if widths(grid, width):
        return [grid]
    if len(grid.rows) <= TURNED and grid.keys == 1 and widths(grid.turned(), width):
        return [grid.turned()]
    keys = list(range(grid.keys))
    parts: list[list[int]] = []
    for i in range(grid.keys, len(grid.columns)):
        if parts and widths(grid.taken([*keys, *parts[-1], i]), width):
            parts[-1].append(i)
        elif widths(grid.taken([*keys, i]), width):
            parts.append([i])
        else:
            return None
    return [grid.taken([*keys, *part]) for part in parts]


def blocks(grid: Grid, width: int) -> Iterator[str]:
    """Lines of one block per row: its first cell, and below it every other with its name."""
    for row in grid.rows:
        yield row[0]
        yield from pairs(list(zip(grid.columns[1:], row[1:], strict=True)), width)


def pairs(named: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    """Lines of names and, beside each, its value, wrapped at spaces."""
    names = max((len(name) for name, _ in named), default=0)
    room = max(TEXT, width - names - 4)
    for name, value in named:
        for i, line in enumerate(_wrapped(value, room)):
            yield f"  {(name if i == 0 else ''):{names}}  {line}"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def show(grid: Grid, width: int, file: TextIO) -> None:
    """Print a grid on a file, at most so wide where that is possible without cutting."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    parts = arranged(grid, width)
    if parts is None:
        print(*blocks(grid, width), sep="\n", file=file)
        return
    for part in parts:
        table = Table()
        found = widths(part, width) or []
        for column, right, w in zip(part.columns, part.right, found, strict=True):
            table.add_column(Text(column), justify="right" if right else "left", width=w)
        for row in part.rows:
            table.add_row(*map(Text, row))
        Console(file=file, width=width).print(table)
