#!/usr/bin/env python
"""Rows of `qncd ablate` for docs/notebook/measured.json, which results.md is drawn from.

    python scripts/ablation_rows.py RUN/ablation.json --note 2026-11-26-ranges-as-published.md \\
        --command "qncd ablate --config fashion_dit --bits w4a8 --num 2000"
    python scripts/results_page.py

They replace those of the same model, variant and bits. Prints them as the table of a note.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from image_rows import MEASURED, text_of

HEADINGS = (
    "variant",
    "to data ↓",
    "to full ↓",
    "as asked ↑",
    "SQNR, dB: pooled; median ↑",
    "gain, dB ↑",
    "PSNR, dB: pooled; median ↑",
    "changed ↓",
    "bytes ↓",
    "Gbit-op. ↓",
)
SAME = ("model", "variant", "bits")
Row = dict[str, Any]


def bits_of(row: Row) -> str:
    return f"W{row['weights']}A{row['activations']}"


def entry(model: str, row: Row) -> Row:
    """A row of measured.json."""
    return {
        "model": model.removeprefix("zoo:"),
        "variant": row["preset"],
        "bits": bits_of(row),
        "distance": float(f"{row['feature_distance_to_full']['value']:.3g}"),
        "sqnr_db": round(row["sqnr_latents_db"], 1),
        "psnr_db": round(row["psnr_db"], 1),
        "bytes": row["artifact_bytes"],
        "gbit_operations": round(row["bit_operations"] / 1e9, 2),
    }


def interval(value: Row | None, form: str) -> str:
    if value is None:
        return ""
    return "{} [{}, {}]".format(*(format(value[key], form) for key in ("value", "low", "high")))


def table_line(row: Row) -> str:
    """A line of a note's table."""
    cells = (
        row["preset"],
        interval(row["feature_distance_to_reference"], ".3g"),
        interval(row["feature_distance_to_full"], ".3g"),
        f"{100 * row['class_agreement']:.1f} %",
        f"{row['sqnr_latents_db']:.1f}; {row['sqnr_median_db']:.1f}",
        interval(row.get("sqnr_gain_db"), "+.2f"),
        f"{row['psnr_db']:.1f}; {row['psnr_median_db']:.1f}",
        str(row["changed"]),
        f"{row['artifact_bytes']:,}",
        f"{row['bit_operations'] / 1e9:.2f}",
    )
    return f"| {' | '.join(cells)} |"


@click.command(help=__doc__.partition("\n")[0])
@click.argument("report", type=click.Path(exists=True, path_type=Path))
@click.option("--note", required=True, help="File of docs/notebook.")
@click.option("--command", required=True, help="That made the report.")
def main(report: Path, note: str, command: str) -> None:
    found = json.loads(report.read_text(encoding="utf-8"))
    groups = json.loads(MEASURED.read_text(encoding="utf-8"))
    rows = [entry(found["model"], row) for row in found["rows"]]
    replaced = {tuple(row[key] for key in SAME) for row in rows}
    for group in groups:
        kept = (r for r in group["rows"] if tuple(r.get(key) for key in SAME) not in replaced)
        group["rows"] = list(kept)
    made = {"note": note, "command": command, "rows": rows}
    groups = [*(group for group in groups if group["rows"]), made]
    MEASURED.write_text(text_of(groups), encoding="utf-8")
    for bits in dict.fromkeys(map(bits_of, found["rows"])):
        some = [row for row in found["rows"] if bits_of(row) == bits]
        lines = [
            f"| {' | '.join(HEADINGS)} |",
            f"|{'---|' * len(HEADINGS)}",
            *map(table_line, some),
        ]
        click.echo(f"{bits}:\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
