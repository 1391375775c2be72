"""Write the tables of docs/results.md and its plots from the measured rows of the notebook.

    python scripts/results_page.py            writes them
    python scripts/results_page.py --check    fails where one is out of date

The rows are those of docs/notebook/measured.json; each group names its note and command. A row
whose numbers are null was withdrawn and has not been measured again.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import written
from dot_plot import Rows, dot_plot
from scatter_plot import scatter_plot

PAGE = written.DOCS / "results.md"
MEASURED = written.DOCS / "notebook" / "measured.json"
PLOTS = written.DOCS / "plots"
PRESETS = {"best": "best", "qdiffusion": "qdiffusion", "minmax": "minmax"}
CORRECTIONS = {
    **{"qdiffusion": "none", "qncd-intra": "intra", "qncd-inter": "inter", "qncd": "both"},
    **{"ptqd": "ptqd", "qdiffusion+stepwise": "stepwise"},
}
"""Presets that are compared, and what a column is called."""
WIDTHS = ["W8A8", "W4A8", "W4A6", "W4A4", "W3A8"]

Measured = dict[str, Any]


def measured() -> list[Measured]:
    groups = json.loads(MEASURED.read_text(encoding="utf-8"))
    return [row for group in groups for row in group["rows"]]


def chosen(found: list[Measured], presets: dict[str, str]) -> dict[str, dict[str, Measured]]:
    """ "model width" -> column -> measured row, for the rows of these presets."""
    models = list(dict.fromkeys(row["model"] for row in found if "bits" in row))
    result: dict[str, dict[str, Measured]] = {}
    for model in models:
        for bits in WIDTHS:
            some = [row for row in found if (row["model"], row.get("bits")) == (model, bits)]
            columns = {presets[r["variant"]]: r for r in some if r["variant"] in presets}
            if columns:
                result[f"{model} {bits}"] = {
                    name: columns[name] for name in presets.values() if name in columns
                }
    return result


def numbers(rows: dict[str, dict[str, Measured]], key: str) -> Rows:
    return {at: {name: row[key] for name, row in some.items()} for at, some in rows.items()}


def quality_table(rows: dict[str, dict[str, Measured]], presets: dict[str, str]) -> str:
    """Distance to full precision and SQNR of every preset, one row a model and width."""
    names = list(presets.values())
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for at, some in rows.items():
        cells = [_quality(some[name]) if name in some else "" for name in names]
        lines.append(f"| {at} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _quality(row: Measured) -> str:
    if row["distance"] is None:
        return "withdrawn"
    return f"{row['distance']:.3g}; {row['sqnr_db']:.1f} dB"


def speed_table(rows: list[Measured]) -> str:
    lines = ["| row | s a call | times float32 |", "|---|---|---|"]
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.3f}"
        lines.append(f"| {row['row']} | {seconds} | {row['speedup']:.2f} |")
    return "\n".join(lines)


def images_table(rows: list[Measured]) -> str:
    """What one image takes end to end, and how far it is from full precision's."""
    lines = ["| row | ms an image | times float32 | PSNR, dB |", "|---|---|---|---|"]
    for row in rows:
        decibels = "" if row["image_psnr_db"] is None else f"{row['image_psnr_db']:.1f}"
        speedup = f"{row['image_seconds'][0] / row['image_seconds'][1]:.2f}"
        lines.append(
            f"| {row['row']} | {1000 * row['image_seconds'][1]:.1f} | {speedup} | {decibels} |"
        )
    return "\n".join(lines)


def of_images(found: list[Measured]) -> tuple[dict[str, str], dict[str, str]]:
    """Tables and plots of `qncd bench --image` by name; none before it was measured.

    Rows have image_seconds, those of the float32 row and their own, and image_psnr_db.
    """
    rows = [row for row in found if "image_seconds" in row]
    if not rows:
        return {}, {}
    points = {row["row"]: (row["image_seconds"][1], row["image_psnr_db"]) for row in rows}
    plot = scatter_plot(points, "seconds an image", "PSNR to full precision, dB")
    return {"images": images_table(rows)}, {"images": plot}


def files() -> dict[Path, str]:
    found = measured()
    presets, corrections = chosen(found, PRESETS), chosen(found, CORRECTIONS)
    presets = {at: some for at, some in presets.items() if "best" in some}
    corrections = {at: some for at, some in corrections.items() if "none" in some}
    speed = sorted((row for row in found if "speedup" in row), key=lambda row: row["speedup"])
    tables = {
        "presets": quality_table(presets, PRESETS),
        "corrections": quality_table(corrections, CORRECTIONS),
        "speed": speed_table(speed),
    }
    more, plots = of_images(found)
    tables |= more
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables.items():
        marks = f"<!-- {name}, from notebook/measured.json -->", "<!-- end -->"
        place = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
        text, count = place.subn(f"{marks[0]}\n\n{table}\n\n{marks[1]}", text)
        if count != 1:
            raise ValueError(f"{PAGE}: no place for the table {name}, between {marks}")
    distance, sqnr = "distance to full precision (lower is better)", "SQNR, dB (higher is better)"
    drawn = {
        "presets": dot_plot(numbers(presets, "distance"), distance, log=True),
        "corrections": dot_plot(numbers(corrections, "sqnr_db"), sqnr),
        "speed": dot_plot(
            {row["row"]: {"speedup": row["speedup"]} for row in speed},
            "LDM-4, one call: times as fast as float32",
            values=True,
        ),
        **plots,
    }
    return {PAGE: text, **{PLOTS / f"{name}.svg": svg for name, svg in drawn.items()}}


if __name__ == "__main__":
    written.main(__doc__, files)
