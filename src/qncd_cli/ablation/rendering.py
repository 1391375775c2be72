"""The table of an ablation as something to read: cells, Markdown, HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..metrics.rows import bits
from ..report.charts import line_chart, scatter
from ..report.images import encode_all
from ..report.page import SMALL_PIXELS, STEP, definitions
from ..report.rendering import render
from ..report.tables import markdown_table
from ..spec import Widths
from ..vocabulary import (
    DIRECTIONS,
    IDENTICAL,
    IDENTICAL_DB,
    MISSING,
    NUMBERS,
    cell,
    heading,
    interval,
    said,
)
from .gains import GAIN
from .strips import FULL, Strip

KEYS = (
    *("feature_distance_to_reference", "feature_distance_to_full", "class_agreement"),
    *("sqnr_latents_db", "sqnr_median_db", "sqnr_q05_db", GAIN),
    *("psnr_db", "psnr_median_db", "psnr_q05_db", "changed"),
    *("ssim", "ssim_median", "ssim_q05"),
    *("bytes", "bit_operations", "extra_calls", "seconds"),
)
FIRST = (
    *("feature_distance_to_reference", "feature_distance_to_full", "class_agreement"),
    *("sqnr_median_db", GAIN, "psnr_median_db", "psnr_q05_db", "changed", "bytes", "seconds"),
)
"""What a page shows at once; more columns do not fit beside each other."""
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
    *("ssim", "ssim_median", "ssim_q05"),
)
"""What a row has of single samples, named as in metrics.json."""


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


def html(table: Mapping[str, Any], title: str, strips: Sequence[Strip], folder: Path) -> str:
    """A page with the table, PSNR over size, SQNR over the steps for every pair of widths, and a
    strip of samples of the same seeds for every row.

    Contact sheets are linked relative to `folder`, where the page is to lie.
    """
    lines = cells(table)
    encoded = encode_all([image for strip in strips for image in strip.images])
    uris = iter(encoded.uris)
    charts = [
        (
            f"{label}: SQNR of the prediction",
            line_chart({r["preset"]: r["sqnr_steps_db"] for r in rows}, STEP, "SQNR, dB"),
        )
        for label, rows in _by_widths(table["rows"]).items()
        if any(row["sqnr_steps_db"] for row in rows)
    ]
    height, width = strips[0].images.shape[-2:] if strips else (0, 0)
    protocol = dict(table["protocol"])
    first = protocol.get("first_seed", 0)
    shown = len(strips[0].images) if strips else 0
    return render(
        "ablation.html",
        title=title,
        verdict=_verdict(table),
        columns=_columns(lines),
        all_columns=COLUMNS,
        lines=lines,
        note=NOTE,
        scatter=_scatter(table["rows"]),
        charts=charts,
        strips=[
            (
                strip.name,
                list(islice(uris, len(strip.images))),
                strip.sheet.relative_to(folder).as_posix() if strip.sheet else "",
            )
            for strip in strips
        ],
        seeds=f"{first} to {first + shown - 1}" if shown > 1 else f"{first}",
        encoding=encoded.note,
        small=width < SMALL_PIXELS,
        size=Markup(f' width="{width}" height="{height}" decoding="async"'),
        facts={"model": table["model"], "samples a row": protocol["num_samples"]},
        protocol=protocol,
        definitions=definitions,
    )


def _columns(lines: Sequence[Mapping[str, str]]) -> list[str]:
    """Headings of FIRST that some row has a number under."""
    named = [heading(key) for key in FIRST]
    return ["variant", "bits", *(n for n in named if any(line[n] != MISSING for line in lines))]


def _verdict(table: Mapping[str, Any]) -> str:
    """The row of highest median PSNR, in a sentence; empty where no row has one."""
    known = [row for row in table["rows"] if row.get("psnr_median_db") is not None]
    if not known:
        return ""
    best = max(known, key=lambda row: row["psnr_median_db"])
    size = (table["full"] or {}).get("bytes")
    smaller = f", {size / best['bytes']:.1f} times smaller" if size else ""
    if best["psnr_median_db"] >= IDENTICAL_DB:
        images = f"{IDENTICAL} images"
    else:
        images = f"median PSNR {said('psnr_median_db', best['psnr_median_db'])}"
    return f"Closest to full precision: {_name(best)}, {images}{smaller}."


def _scatter(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The median PSNR of every row over its size, a colour for each preset."""
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    points = [
        (_name(row), row["bytes"] / 1e6, row["psnr_median_db"], presets.index(row["preset"]))
        for row in rows
        if row.get("psnr_median_db") is not None and row["psnr_median_db"] < IDENTICAL_DB
    ]
    return scatter(points, heading("bytes"), heading("psnr_median_db")) if points else None


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['preset']} {Widths(row['weights'], row['activations']).label}"


def _by_widths(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(Widths(row["weights"], row["activations"]).label, []).append(row)
    return found
