"""The table of an ablation as something to read: cells, Markdown, HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..metrics.rows import bits
from ..report.page import chart, definitions, markdown_table, page
from ..spec import Widths
from ..vocabulary import DIRECTIONS, IDENTICAL, NUMBERS, cell, heading, interval
from .gains import GAIN

KEYS = (
    *("feature_distance_to_reference", "feature_distance_to_full", "class_agreement"),
    *("sqnr_latents_db", "sqnr_median_db", "sqnr_q05_db", GAIN),
    *("psnr_db", "psnr_median_db", "psnr_q05_db", "changed"),
    *("bytes", "bit_operations", "extra_calls", "seconds"),
)
COLUMNS = ("variant", "bits", *map(heading, KEYS))
NOTE = (
    f"{DIRECTIONS} Bits: of weights and of activations, in brackets the means over all "
    "multiplications. "
    + " ".join(f"{NUMBERS[key].name}: {NUMBERS[key].says}" for key in KEYS)
    + " Of the time, stages shared with earlier rows are left out."
)
SPREAD = (
    *("per_seed", "changed", "psnr_median_db", "psnr_q05_db"),
    *("sqnr_median_db", "sqnr_q05_db"),
)
"""What a row has of single samples, named as in metrics.json."""
FULL = "full precision"


# ------------------------------------------------------------------ numbers of a row


def fidelity(measured: Mapping[str, Any]) -> dict[str, Any]:
    """A row's numbers from the object `fidelity` of metrics.json.

    Infinite decibels (equal images or latents) are null in JSON; identical_* says so.
    """
    psnr, sqnr = measured["psnr_db"], measured["sqnr_latents_db"]
    return {
        "psnr_db": _finite(psnr),
        "sqnr_latents_db": _finite(sqnr),
        "sqnr_steps_db": [_finite(value) for value in measured["sqnr_steps_db"]],
        "identical_images": psnr == math.inf,
        "identical_latents": sqnr == math.inf,
        "feature_distance_to_full": _bounds(measured["feature_distance"]),
        **{key: measured[key] for key in SPREAD},
    }


def distribution(measured: Mapping[str, Any]) -> dict[str, Any]:
    """A row's numbers from the object of one set in metrics.json."""
    return {
        "feature_distance_to_reference": _bounds(measured.get("feature_distance")),
        "class_agreement": measured.get("class_agreement"),
    }


def _bounds(entry: Mapping[str, Any] | None) -> dict[str, float | None] | None:
    if entry is None:
        return None
    return {key: _finite(entry[key]) for key in ("value", "low", "high")}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# ------------------------------------------------------------------ to read


def cells(table: Mapping[str, Any], keys: Sequence[str] = KEYS) -> list[dict[str, str]]:
    """One mapping of COLUMNS per line of the table, as text, full precision first.

    keys: numbers that are wanted, of KEYS.
    """
    lines = []
    if table["full"] is not None:
        lines.append({"variant": FULL, "bits": "float32", **_numbers(table["full"], keys)})
    return lines + [
        {"variant": row["preset"], "bits": bits(row), **_numbers(row, keys)}
        for row in table["rows"]
    ]


def _numbers(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """Cells by heading. Infinite decibels are null in a row, which says so elsewhere."""
    same = {"sqnr_latents_db": "identical_latents", "psnr_db": "identical_images"}
    found = {}
    for key in keys:
        value = row.get(key)
        if isinstance(value, Mapping):
            value = interval(value)
        if row.get(same.get(key, "")):
            value = IDENTICAL
        found[heading(key)] = cell(key, value)
    return found


def markdown(table: Mapping[str, Any], title: str) -> str:
    """The table with its title and its note."""
    lines = cells(table)
    return f"# {title}\n\n{markdown_table(lines, COLUMNS)}\n{NOTE}\n"


def html(
    table: Mapping[str, Any], title: str, sheets: Sequence[tuple[str, Path]], folder: Path
) -> str:
    """A page with the table, SQNR over the steps for every pair of widths, and sheets of samples.

    sheets: name and picture of a row, linked relative to `folder`, where the page is to lie.
    """
    parts = [f"<h1>{escape(title)}</h1>", _html_table(cells(table)), f"<p>{escape(NOTE)}</p>"]
    for label, rows in _by_widths(table["rows"]).items():
        curves = {row["preset"]: row["sqnr_steps_db"] for row in rows}
        if any(curves.values()):
            parts.append(f"<h2>{label}: SQNR of the noise prediction over the sampling steps</h2>")
            parts.append(chart(curves, "sampling step", "SQNR, dB"))
    if sheets:
        parts.append("<h2>Samples of the same seeds</h2>")
        items = (
            f'<li><a href="{escape(path.relative_to(folder).as_posix())}">{escape(name)}</a></li>'
            for name, path in sheets
        )
        parts.append(f"<ul>{''.join(items)}</ul>")
    parts += ["<h2>What was measured</h2>", definitions(table["protocol"])]
    return page(title, parts)


def _html_table(lines: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in COLUMNS)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-name="{escape(n)}">{escape(line[n])}</td>' for n in COLUMNS)
        + "</tr>"
        for line in lines
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _by_widths(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(Widths(row["weights"], row["activations"]).label, []).append(row)
    return found
