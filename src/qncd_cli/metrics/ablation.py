"""The table of an ablation as something to read: cells, Markdown, HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..vocabulary import cell, number
from .curve import line_chart
from .report import definitions, markdown_table, page

COLUMNS = (
    "variant",
    "bits",
    "to data ↓",
    "to full ↓",
    "as asked ↑",
    "SQNR, dB ↑",
    "SQNR, median ↑",
    "SQNR, 5 % ↑",
    "PSNR, dB ↑",
    "PSNR, median ↑",
    "PSNR, 5 % ↑",
    "changed ↓",
    "MB ↓",
    "Gbit-op. ↓",
    "calls",
    "seconds",
)
NOTE = (
    "to data, to full: Frechet distance of features to the reference and to the full-precision "
    "images, in brackets the 95% bootstrap interval; as asked: share of images classified as "
    "asked; SQNR of the final latents, PSNR of the images, against full precision on the same "
    "seeds, over all of them together, of the median sample and of the one that 5 % lie below; "
    "changed: images below 20 dB PSNR, which are other images than full precision's; bit "
    "operations of one denoiser call on one sample; calls: extra denoiser calls of the "
    "correction, a batch; seconds: spent on the row, stages shared with earlier rows left out."
)
SPREAD = (
    *("per_seed", "changed", "psnr_median_db", "psnr_q05_db"),
    *("sqnr_median_db", "sqnr_q05_db"),
)
"""What a row has of single samples, named as in metrics.json."""
FULL = "full precision"
IDENTICAL = "identical"


# ------------------------------------------------------------------ numbers of a row


def fidelity(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Of metrics.json's object of that name. Infinite decibels (equal images or latents) are null
    in JSON; identical_* says so."""
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
    """Of a set's object in metrics.json."""
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


def cells(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One mapping of COLUMNS per line of the table, full precision first; None where unknown."""
    lines = []
    if table["full"] is not None:
        full = table["full"]
        blank: dict[str, Any] = dict.fromkeys(COLUMNS)
        lines.append({**blank, "variant": FULL, "bits": "float32", **_shared(full)})
    return lines + [_line(row) for row in table["rows"]]


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "variant": row["preset"],
        "bits": _widths(row),
        **_shared(row),
        "to full ↓": _interval(row["feature_distance_to_full"]),
        "SQNR, dB ↑": IDENTICAL if row["identical_latents"] else row["sqnr_latents_db"],
        "SQNR, median ↑": cell("sqnr_median_db", row["sqnr_median_db"]),
        "SQNR, 5 % ↑": cell("sqnr_q05_db", row["sqnr_q05_db"]),
        "PSNR, dB ↑": IDENTICAL if row["identical_images"] else row["psnr_db"],
        "PSNR, median ↑": cell("psnr_median_db", row["psnr_median_db"]),
        "PSNR, 5 % ↑": cell("psnr_q05_db", row["psnr_q05_db"]),
        "changed ↓": row["changed"],
        "Gbit-op. ↓": row["bit_operations"] / 1e9,
        "calls": row["extra_calls"],
        "seconds": row["seconds"],
    }


def _shared(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What full precision has too."""
    return {
        "to data ↓": _interval(entry["feature_distance_to_reference"]),
        "as asked ↑": entry["class_agreement"],
        "MB ↓": entry["bytes"] / 1e6,
    }


def _interval(entry: Mapping[str, Any] | None) -> str | None:
    if entry is None or entry["value"] is None:
        return None
    text = number(entry["value"])
    if entry["low"] is None or entry["high"] is None:
        return text
    return f"{text} [{number(entry['low'])}, {number(entry['high'])}]"


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
    for widths, rows in _by_widths(table["rows"]).items():
        curves = {row["preset"]: row["sqnr_steps_db"] for row in rows}
        if any(curves.values()):
            parts.append(f"<h2>{widths}: SQNR of the noise prediction over the sampling steps</h2>")
            parts.append(line_chart(curves, "sampling step", "SQNR, dB"))
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
        "<tr>" + "".join(f"<td>{escape(show(line[name]))}</td>" for name in COLUMNS) + "</tr>"
        for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def show(value: Any) -> str:
    """A cell as text."""
    return value if isinstance(value, str) else number(value)


def _by_widths(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(_widths(row), []).append(row)
    return found


def _widths(row: Mapping[str, Any]) -> str:
    return f"W{row['weights']}A{row['activations']}"
