"""What the bench measured as something to read: cells, Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .report import markdown_table

COLUMNS = (
    "row",
    "s/call",
    "spread",
    "speedup",
    "roofline",
    "peak MiB",
    "running MiB",
    "disk MiB",
    "load s",
    "prepare s",
)
NOTE = (
    "s/call: median over the rounds of one call of the denoiser, all rows in turn in one process; "
    "spread: between the quartiles; speedup: over float32-eager; roofline: the model's arithmetic "
    "per second over the best rate that one large product of that kind reached beside it (simulate "
    "computes in float32). Memory and loading, each row alone in a process: peak: growth of the "
    "resident set up to its highest point, from loading to the second call; running: the same "
    "during a call when all is prepared; disk: everything that the denoiser is read from; load: "
    "from the files to a denoiser; prepare: what the first call takes over the second (compiling "
    "without a cache, packing weights)."
)
_MIB = 2**20


def cells(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One mapping of COLUMNS per row; None where nothing was measured."""
    return [
        {
            "row": row["name"],
            "s/call": row["seconds_per_call"],
            "spread": row["spread"],
            "speedup": row["speedup"],
            "roofline": row["roofline"],
            "peak MiB": _mib(row["peak_bytes"]),
            "running MiB": _mib(row["running_bytes"]),
            "disk MiB": _mib(row["disk_bytes"]),
            "load s": row["load_seconds"],
            "prepare s": row["prepare_seconds"],
        }
        for row in report["rows"]
    ]


def _mib(size: int | None) -> float | None:
    return None if size is None else size / _MIB


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
