"""What a reader wants first: one sentence about a quantized model, and the table below it.

Numbers that were not measured are left out of the sentence. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..metrics.rows import columns, rows
from ..spec import Widths
from ..vocabulary import IDENTICAL, IDENTICAL_DB, NUMBERS, cell, heading, interval, said, terms

BASELINE = "float32-eager"
"""The bench's row of full precision."""
SPEED = ("seconds_per_call", "speedup")
FAR_DB = 25.0
"""Median PSNR below which many images are others than full precision's."""


@dataclass(frozen=True)
class Cell:
    """A number as text, and the interval around it, each empty where there is none."""

    text: str
    range: str = ""


@dataclass(frozen=True)
class HeadTable:
    """columns: of the cells; rows: heading -> cells; terms: what words in it mean."""

    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    terms: Mapping[str, str]


def verdict(metrics: Mapping[str, Any], model: str, date: str = "") -> str:
    """Model, bits, preset, times smaller, decibels, date: what is known of them."""
    made, size = _mapping(metrics.get("quantization")), _mapping(metrics.get("bytes"))
    fidelity, protocol = (_mapping(metrics.get(key)) for key in ("fidelity", "protocol"))
    words = [model]
    if made:
        words.append(f"at {Widths(made['weights'], made['activations']).label}")
        words.append(f"(preset {made['preset']})" if made.get("preset") else "(no preset)")
    facts = []
    if size.get("full") and size.get("quantized"):
        facts.append(f"{size['full'] / size['quantized']:.1f} times smaller")
    median = fidelity.get("psnr_median_db")
    if median is not None and median >= IDENTICAL_DB:
        facts.append(f"images {IDENTICAL} to full precision's")
    elif median is not None:
        facts.append(f"median PSNR {said('psnr_median_db', median)} to full precision")
    changed, count = fidelity.get("changed"), protocol.get("num_samples")
    if changed is not None and count:
        facts.append(f"{changed} of {count} images changed")
    text = " ".join(words) + (f": {', '.join(facts)}" if facts else "")
    return f"{text}; {date}." if date else f"{text}."


def way_out(metrics: Mapping[str, Any]) -> str:
    """What to try where the images are far from full precision's; empty where they are not."""
    median = _mapping(metrics.get("fidelity")).get("psnr_median_db")
    made = _mapping(metrics.get("quantization"))
    if not made or median is None or median >= FAR_DB:
        return ""
    return (
        f"A median PSNR below {FAR_DB:g} dB: many images are others than full precision's. Try "
        "--set correction.intra=auto (a few channels of some models are far wider than the rest), "
        "or more bits."
    )


def head_table(
    metrics: Mapping[str, Any],
    others: Mapping[str, Mapping[str, Any]] | None = None,
    bench: Mapping[str, Any] | None = None,
) -> HeadTable:
    """The rows of metrics.json, those of speed, and a column for each further set.

    others: name -> metrics.json of a set of the same seeds that was measured alike; bench: the
    content of bench.json of this model on this machine.
    """
    found = rows(metrics)
    beside = {name: {row.label: row for row in rows(m)} for name, m in (others or {}).items()}
    lines = []
    for row in found:
        more = [
            other[row.label].values[-1] if row.label in other else None for other in beside.values()
        ]
        lines.append((row.label, [_cell(row.key, value) for value in [*row.values, *more]]))
    alike = [metrics, *(others or {}).values()]
    lines += speed_rows(bench, alike) if bench and _mapping(metrics.get("full")) else []
    return HeadTable([*columns(metrics), *beside], lines, terms(row.label for row in found))


def speed_rows(
    bench: Mapping[str, Any], quantized: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[Cell]]]:
    """Time of a denoiser call and speedup over float32, of what each set was drawn with.

    quantized: metrics.json of sets. What the bench has no row of is missing; no row at all where
    it has none of any.
    """
    measured = {row["name"]: row for row in bench.get("rows", ())}
    found = [measured.get(name) for name in (BASELINE, *map(_bench_row, quantized))]
    if found[0] is None or not any(found[1:]):
        return []
    return [
        (heading(key), [_cell(key, row[key] if row else None) for row in found]) for key in SPEED
    ]


def _bench_row(metrics: Mapping[str, Any]) -> str:
    """The name by which the bench knows what a set was drawn with."""
    made, protocol = (_mapping(metrics.get(key)) for key in ("quantization", "protocol"))
    if not made:
        return ""
    label = Widths(made["weights"], made["activations"]).label.lower()
    compiled = "-compiled" if protocol.get("compiled") else ""
    return f"{protocol.get('backend')}-{label}{compiled}"


def _cell(key: str, value: Any) -> Cell:
    """A number, text, or an entry {value, low, high}."""
    if not isinstance(value, Mapping):
        known = key in NUMBERS
        return Cell(cell(key, value) if known else "" if value is None else str(value))
    text, _, rest = (interval(value) or cell(key, None)).partition(" ")
    return Cell(text, rest)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
