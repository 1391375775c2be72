"""The commands eval and compare: measure sample sets, put runs side by side."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..metrics.record import METRICS, differing
from ..metrics.rows import OF_FIDELITY, POOLED
from ..runs.evaluate import Evaluated, is_whole
from ..runs.evaluate import evaluate as evaluate_run
from ..runs.measuring import Wishes, protocol_of_images, settle
from ..store.files import read_json
from ..store.run_dir import RunDir
from ..vocabulary import IDENTICAL, MISSING, NUMBERS, cell, heading, interval
from .console import Console
from .shared import explain, watching

SHOWN = (
    *("feature_distance_to_reference", "feature_distance_to_full", "class_agreement"),
    *(*OF_FIDELITY, "bytes", "share_of_float32"),
)
"""What compare shows."""


@dataclass(frozen=True)
class EvalOptions:
    fid: bool
    isc: bool
    kid: bool
    prc: bool
    reference: str | None
    network: str
    inception_weights: str | None
    images: str | None = None
    name: str = "quantized"
    run_dir: str | None = None
    device: str = "auto"

    @property
    def wishes(self) -> Wishes:
        named = tuple(name for name in METRICS if getattr(self, name))
        return Wishes(named, self.reference, self.network, self.inception_weights)


def evaluate(console: Console, options: EvalOptions) -> None:
    if options.images is not None:
        from ..stages import evaluate as stage

        protocol = protocol_of_images(options.wishes)
        metrics = stage.measure_images(Path(options.images), protocol, console.track)
        title = f"{metrics['protocol']['num_samples']} images"
        console.result(metrics, lambda: render(console, metrics, title))
        settle(console.note, metrics["protocol"]["left_out"], options.wishes)
        return
    evaluate_run(
        options.run_dir,
        metrics=options.wishes.named,
        reference=options.reference,
        network=options.network,
        inception_weights=options.inception_weights,
        name=options.name,
        device=options.device,
        command=shlex.join(["qncd", *sys.argv[1:]]),
        watch=watching(console),
        show=lambda done: _show(console, done),
    )


def _show(console: Console, done: Evaluated) -> None:
    metrics = done.metrics
    how = "unchanged, skipped" if done.skipped else f"done in {console.lap():.1f} s"

    def show() -> None:
        render(console, metrics, f"{metrics['protocol']['num_samples']} samples, same seeds")
        print(f"eval: {how}, {done.report}")

    console.result({**metrics, "run_dir": str(done.run.path)}, show)


def render(console: Console, metrics: Mapping[str, Any], title: str) -> None:
    """Print what was measured, and what its words mean."""
    from ..metrics.rows import columns, rows

    found = rows(metrics)
    cells = [[row.label, *(_cell(row.key, value) for value in row.values)] for row in found]
    console.table(["", *columns(metrics)], cells, title)
    explain(row.label for row in found)


def _cell(key: str, value: Any) -> str:
    value = interval(value) if isinstance(value, dict) else value
    return cell(key, value) if key in NUMBERS else str(value)


# ------------------------------------------------------------------ compare


def compare(console: Console, run_dirs: Sequence[str]) -> None:
    """Rows of several runs. Raises ArtifactError when they were measured differently."""
    evaluated = {
        d: read_json(RunDir(Path(d)).metrics, f"qncd eval --run-dir {d}") for d in run_dirs
    }
    for d, metrics in evaluated.items():
        whole = is_whole(metrics)
        if not whole or not metrics["fidelity"].keys() >= {"per_seed", "changed"}:
            what = "of an earlier version of qncd" if whole else "damaged"
            raise ArtifactError(
                f"{RunDir(Path(d)).metrics}: {what}", f'repeat "qncd eval --run-dir {d}"'
            )
    first, *others = evaluated.items()
    for name, metrics in others:
        keys = differing(first[1]["protocol"], metrics["protocol"])
        if keys:
            raise ArtifactError(
                f"{first[0]} and {name} were measured in different protocols ({', '.join(keys)})",
                "evaluate both with the same options",
            )
    full = first[1]
    rows = [_compared("full precision", full["full"], None, full["bytes"]["full"], {})]
    for d, metrics in evaluated.items():
        size, made = metrics["bytes"]["quantized"], metrics.get("quantization") or {}
        name, measured = Path(d).name, (metrics["quantized"], metrics["fidelity"])
        rows.append(_compared(name, *measured, size, made))
    for row in rows:
        row["share_of_float32"] = row["bytes"] / rows[0]["bytes"]

    def render() -> None:
        from ..metrics.rows import bits

        protocol = full["protocol"]
        title = f"{protocol['num_samples']} samples, same seeds"
        if protocol["network"]:
            title += f"; distances in the features of {protocol['network']}"
        cells = [
            [row["name"], bits(row) if "weights" in row else MISSING]
            + [_compared_cell(row, key) for key in SHOWN]
            for row in rows
        ]
        cells[0][1] = "float32"
        headings = ["", "bits", *map(heading, SHOWN)]
        console.table(headings, cells, title)
        explain(headings)

    console.result({"rows": rows, "protocol": full["protocol"]}, render)


def _compared(
    name: str,
    entry: dict[str, Any],
    fidelity: dict[str, Any] | None,
    size: int,
    made: dict[str, Any],
) -> dict[str, Any]:
    to_data = entry.get("feature_distance") or {}
    to_full = (fidelity or {}).get("feature_distance") or {}
    return {
        "name": name,
        **made,
        "feature_distance_to_reference": to_data.get("value"),
        "feature_distance_to_full": to_full.get("value"),
        "class_agreement": entry.get("class_agreement"),
        **{key: fidelity[key] if fidelity else None for key in OF_FIDELITY},
        "bytes": size,
    }


def _compared_cell(row: dict[str, Any], key: str) -> str:
    """Pooled decibels are null where all is identical, which a full-precision row has none of."""
    same = key in POOLED and row[key] is None and row["changed"] is not None
    return IDENTICAL if same else cell(key, row[key])
