"""What the bench measured as something to read: cells, Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..report.tables import markdown_table
from ..vocabulary import NUMBERS, cell, heading

KEYS = (
    "seconds_per_call",
    "spread",
    "speedup",
    "roofline",
    "peak_bytes",
    "running_bytes",
    "disk_bytes",
    "load_seconds",
    "prepare_seconds",
)
COLUMNS = ("row", *map(heading, KEYS))
NOTE = "; ".join(f"{NUMBERS[key].name}: {NUMBERS[key].says.rstrip('.')}" for key in KEYS) + (
    ". All rows are timed in turn in one process; memory and loading are measured of each row "
    "alone in a process. Simulated rows compute in float32."
)


def cells(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One mapping of COLUMNS per row, as text; "–" where nothing was measured."""
    return [
        {"row": row["name"], **{heading(key): cell(key, row[key]) for key in KEYS}}
        for row in report["rows"]
    ]


def profile_columns(report: Mapping[str, Any]) -> list[str]:
    return ["where the time goes, %", *report["profile"]]


def profile_cells(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One mapping of profile_columns per kind of work: its share of a call, in percent."""
    profiles = report["profile"]
    kinds = next(iter(profiles.values()))["shares"] if profiles else ()
    first = profile_columns(report)[0]
    return [
        {first: kind, **{name: 100 * found["shares"][kind] for name, found in profiles.items()}}
        for kind in kinds
    ]


def conditions(report: Mapping[str, Any]) -> str:
    """What was measured, and on what, in one sentence."""
    machine = report["machine"]
    rates = ", ".join(f"{kind} {rate / 1e12:.3g}" for kind, rate in report["rates"].items())
    return (
        f"{report['model']}, {report['parameters'] / 1e6:.1f} M parameters, "
        f"{report['macs'] / 1e9:.4g} GMAC a sample, batch {report['batch_size']}, "
        f"{report['rounds']} rounds; {machine['cpu']} ({machine['capability']}), "
        f"{machine['threads']} threads, torch {machine['torch']}; "
        f"best rates in tera-operations per second: {rates}"
    )


def missing(report: Mapping[str, Any]) -> list[str]:
    """One line for every row that could not be measured."""
    return [f"{name}: not measured: {why}" for name, why in report["unavailable"].items()]


def markdown(report: Mapping[str, Any], title: str) -> str:
    """The table, what is missing in it, the profile if there is one, the conditions."""
    parts = [f"# {title}", conditions(report), markdown_table(cells(report), COLUMNS).rstrip("\n")]
    parts += [f"- {line}" for line in missing(report)]
    if report["profile"]:
        table = markdown_table(profile_cells(report), profile_columns(report))
        parts.append(table.rstrip("\n"))
    return "\n\n".join([*parts, NOTE]) + "\n"
