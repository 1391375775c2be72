#!/usr/bin/env python
"""Write docs/numbers.md from the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import written

from qncd_cli.vocabulary import SECTIONS, TERMS, heading

TARGET = written.DOCS / "numbers.md"
INTRODUCTION = """\
What every number is called, in tables, reports and JSON files. ↑ higher is better, ↓ lower is
better. A megabyte (MB) is 10^6 bytes. JSON files hold bytes, shares (0.146, not 14.6 %) and plain
counts; a number that was not measured is null there, and "–" in a table."""


def document() -> str:
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield from ("# Numbers", "", "Written by `make docs` from the vocabulary of the code.", "")
    yield from (INTRODUCTION, "", "## Terms", "")
    for term, sentence in TERMS.items():
        yield f"- **{term}**: {sentence}"
    for title, numbers in SECTIONS.items():
        yield from ("", f"## {title}", "", "| name | key | what it is |", "| --- | --- | --- |")
        for key, known in numbers.items():
            yield f"| {heading(key)} | `{key}` | {known.says} |"
    yield from ("", NESTING)


NESTING = """\
In metrics.json `full`, `quantized` and `images` are sets: their `feature_distance`,
`kernel_distance` and `class_score` are entries with `value` and `network`; `fidelity` compares the
sets, and its `feature_distance` is the distance to full. What decibels say of identical images or
latents: null in pooled numbers, 200 in those of single samples."""


if __name__ == "__main__":
    written.main(__doc__, lambda: {TARGET: document()})
