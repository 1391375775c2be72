#!/usr/bin/env python
"""Rows of `qncd bench --image` for docs/notebook/measured.json, which results.md is drawn from.

    python scripts/image_rows.py runs/NAME/bench_image.json --batch 8 --note 2026-11-28-images.md

They replace those of the same note. After that, results.md needs a place for the table (the lines
`<!-- images, from notebook/measured.json -->` and `<!-- end -->`) and the picture plots/images.svg;
scripts/results_page.py writes both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import written

BASELINE = "float32-eager"
MEASURED = written.DOCS / "notebook" / "measured.json"


def group_of(report: dict[str, Any], batch: int, note: str, command: str) -> dict[str, Any]:
    """A group of measured.json. Raises click.UsageError where the batch size was not measured."""
    some = {row["name"]: row for row in report["rows"] if row["batch_size"] == batch}
    if BASELINE not in some:
        raise click.UsageError(f"no row {BASELINE} at batch {batch}")
    base = some[BASELINE]["seconds_per_image"]
    rows = [
        {
            "model": report["model"],
            "row": name,
            "image_seconds": [round(base, 5), round(row["seconds_per_image"], 5)],
            "image_psnr_db": None if row["psnr_db"] is None else round(row["psnr_db"], 1),
        }
        for name, row in some.items()
    ]
    return {"note": note, "command": command, "rows": rows}


def text_of(groups: list[dict[str, Any]]) -> str:
    """measured.json, a row a line."""
    parts = []
    for group in groups:
        rows = ",\n".join(f"   {json.dumps(row, ensure_ascii=False)}" for row in group["rows"])
        head = {key: value for key, value in group.items() if key != "rows"}
        keys = "".join(f"  {json.dumps(k)}: {json.dumps(v)},\n" for k, v in head.items())
        parts.append(f' {{\n{keys}  "rows": [\n{rows}\n  ]\n }}')
    return "[\n" + ",\n".join(parts) + "\n]\n"


@click.command(help=__doc__.partition("\n")[0])
@click.argument("report", type=click.Path(exists=True, path_type=Path))
@click.option("--batch", default=8, show_default=True)
@click.option("--note", required=True, help="File of docs/notebook.")
@click.option("--command", default="qncd bench --image", show_default=True)
def main(report: Path, batch: int, note: str, command: str) -> None:
    groups = json.loads(MEASURED.read_text(encoding="utf-8"))
    made = group_of(json.loads(report.read_text(encoding="utf-8")), batch, note, command)
    kept = [g for g in groups if g["note"] != note or "image_seconds" not in g["rows"][0]]
    MEASURED.write_text(text_of([*kept, made]), encoding="utf-8")


if __name__ == "__main__":
    main()
