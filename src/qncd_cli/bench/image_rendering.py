"""What `qncd bench --image` measured as something to read: cells, Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report.tables import markdown_table
from ..vocabulary import cell, heading, number
from .images import BASELINE, PARTS

COLUMNS = (
    *("row", "ms an image ↓", "spread", "times faster ↑"),
    *PARTS,
    *map(heading, ("psnr_db", "psnr_median_db", "sqnr_latents_db", "peak_bytes")),
)
NOTE = (
    "Milliseconds per image, the median of the rounds; spread: third quartile less the first. "
    "text, steps, correction, decoder, png: what each part takes of them. PSNR of images and SQNR "
    "of latents to the float32-eager row's on the same seeds. Peak memory is that of a process "
    "which draws this row alone, model included. Rows are timed in turn in one process."
)


def batches(report: Mapping[str, Any]) -> list[int]:
    return list(dict.fromkeys(row["batch_size"] for row in report["rows"]))


def cells(report: Mapping[str, Any], batch: int) -> list[dict[str, str]]:
    """One mapping of COLUMNS per row of that batch size, as text."""
    found = []
    for row in report["rows"]:
        if row["batch_size"] != batch:
            continue
        times = [row["seconds_per_image"], row["spread"]]
        milliseconds = [number(1000 * value) for value in times]
        parts = [number(1000 * row["parts"][part]) for part in PARTS]
        numbers = [_decibels(row, key) for key in ("psnr_db", "psnr_median_db", "sqnr_latents_db")]
        texts = [
            row["name"],
            *milliseconds,
            number(row["speedup"]),
            *parts,
            *numbers,
            cell("peak_bytes", row["peak_bytes"]),
        ]
        found.append(dict(zip(COLUMNS, texts, strict=True)))
    return found


def _decibels(row: Mapping[str, Any], key: str) -> str:
    if row["name"] == BASELINE:
        return cell(key, None)
    return cell(key, float("inf") if row[key] is None else row[key])


def conditions(report: Mapping[str, Any]) -> str:
    """What was measured, and on what, in one sentence."""
    place, sampling = report["machine"], report["sampling"]
    return (
        f"{report['model']}, {sampling['scheduler']}, {sampling['steps']} steps, guidance "
        f"{sampling['guidance_scale']:g}, fidelity of {report['num_samples']} images, "
        f"{report['rounds']} rounds; {place['cpu']} ({place['capability']}), "
        f"{place['threads']} threads, torch {place['torch']}"
    )


def missing(report: Mapping[str, Any]) -> Sequence[str]:
    """One line for every row that could not be measured."""
    return [f"{name}: not measured: {why}" for name, why in report["unavailable"].items()]


def markdown(report: Mapping[str, Any], title: str) -> str:
    """A table for every batch size, what is missing, the conditions."""
    parts = [f"# {title}", conditions(report)]
    for batch in batches(report):
        table = markdown_table(cells(report, batch), COLUMNS).rstrip("\n")
        parts += [f"Batch {batch}:", table]
    parts += [f"- {line}" for line in missing(report)]
    return "\n\n".join([*parts, NOTE]) + "\n"
