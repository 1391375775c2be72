#!/usr/bin/env python
"""Rows of `qncd ablate` for docs/notebook/measured.json, which results.md is drawn from.

    python scripts/ablation_rows.py RUN/ablation.json --note 2026-11-26-ranges-as-published.md \\
        --command "qncd ablate --config fashion_dit --bits w4a8 --num 2000"
    python scripts/results_page.py

They replace those of the same model, variant and bits. A note's table is ablation.md, which stands
beside the report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from image_rows import MEASURED, text_of

SAME = ("model", "variant", "bits")
Row = dict[str, Any]


def bits_of(row: Row) -> str:
    return f"W{row['weights']}A{row['activations']}"


def entry(model: str, row: Row) -> Row:
    """A row of measured.json: distance to full precision, SQNR of latents and PSNR of images in dB,
    both pooled, bytes of the artifact, 10^9 bit operations of a call on one sample."""
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


@click.command(help=__doc__.partition("\n")[0])
@click.argument("report", type=click.Path(exists=True, path_type=Path))
@click.option("--note", required=True, help="File of docs/notebook.")
@click.option("--command", required=True, help="That made the report.")
def main(report: Path, note: str, command: str) -> None:
    """report: ablation.json of a finished table."""
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


if __name__ == "__main__":
    main()
