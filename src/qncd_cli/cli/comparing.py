"""The command compare: evaluated runs side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..metrics.record import differing, remarked
from ..metrics.rows import OF_FIDELITY, POOLED
from ..runs.reporting import is_whole
from ..store.digests import flat, spelled
from ..store.files import read_json
from ..store.run_dir import RunDir
from ..vocabulary import IDENTICAL, MISSING, cell, heading
from .console import Console
from .shared import explain

SHOWN = (
    *("feature_distance_to_reference", "feature_distance_to_full", "class_agreement"),
    *("clip_score", *OF_FIDELITY, "bytes", "share_of_float32"),
)
"""What compare shows."""
ON_REQUEST = (
    *("cvvdp_jod", "cvvdp_jod_median", "cvvdp_jod_q05"),
    *("lpips", "lpips_median", "lpips_q95", "clip_score"),
)
"""Shown only where it was measured."""
NEEDED = tuple(key for key in OF_FIDELITY if key not in ON_REQUEST)
FULL = "full precision"
DIGEST = 12
"""Characters of a digest in a sentence."""


def compare(console: Console, run_dirs: Sequence[str], *, force: bool = False) -> None:
    """Rows of several runs.

    force: also of runs that were measured in different protocols, which raise ArtifactError else;
    each protocol then has a row of full precision, and each difference a column.
    """
    evaluated = {d: _read(d) for d in run_dirs}
    protocols = {d: metrics["protocol"] for d, metrics in evaluated.items()}
    fields = _fields(console, protocols, force=force)
    rows: list[dict[str, Any]] = []
    full: dict[str, dict[str, Any]] = {}
    for d, metrics in evaluated.items():
        differs = {field: _value(protocols[d], field) for field in fields}
        kind = json.dumps(differs, sort_keys=True)
        with _whole(d):
            if kind not in full:
                size = metrics["bytes"]["full"]
                full[kind] = _compared(FULL, metrics["full"], None, size, {}, differs)
            size, made = metrics["bytes"]["quantized"], metrics.get("quantization") or {}
            measured = metrics["quantized"], metrics["fidelity"]
            row = _compared(Path(d).name, *measured, size, made, differs)
            rows.append({**row, "share_of_float32": size / full[kind]["bytes"]})
    rows = [*({**row, "share_of_float32": 1.0} for row in full.values()), *rows]
    protocol = protocols[run_dirs[0]]
    payload = {"rows": rows, "protocol": protocol, "differing": fields}
    console.result(payload, lambda: _render(console, rows, protocol, fields))


def _read(run_dir: str) -> dict[str, Any]:
    """metrics.json of a run. Raises ArtifactError where it is damaged or an earlier version's."""
    path = RunDir(Path(run_dir)).metrics
    metrics = read_json(path, f"qncd eval --run-dir {run_dir}")
    whole = is_whole(metrics)
    if not whole or not metrics["fidelity"].keys() >= {"per_seed", *NEEDED}:
        what = "of an earlier version of qncd" if whole else "damaged"
        raise ArtifactError(f"{path}: {what}", f'repeat "qncd eval --run-dir {run_dir}"')
    return metrics


@contextmanager
def _whole(run_dir: str) -> Iterator[None]:
    """Within the block, what is missing in a run's metrics.json or of another type is damage.

    Raises ArtifactError.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        path = RunDir(Path(run_dir)).metrics
        raise ArtifactError(
            f"{path}: damaged ({type(error).__name__}: {error})",
            f'repeat "qncd eval --run-dir {run_dir}"',
        ) from error


def _fields(console: Console, protocols: Mapping[str, Any], *, force: bool) -> list[str]:
    """Keys of the protocols in which runs differ from the first. Raises ArtifactError."""
    (first, protocol), *others = protocols.items()
    fields: list[str] = []
    for d, other in others:
        found = differing(protocol, other)
        if found and not force:
            raise ArtifactError(
                f"{first} and {d} were measured in different protocols: {_said(found)}",
                "evaluate both with the same options, or --force-compare shows what differs",
            )
        fields += [field for field in found if field not in fields]
        if remarks := remarked(protocol, other):
            console.note(f"{first} and {d}: {_said(remarks)}; numbers may differ by rounding")
    return fields


def _said(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Keys, each with both values."""
    phrases = []
    for field, values in found.items():
        one, other = (_shown(field, value) for value in values)
        phrases.append(f"{field} {one} against {'another one' if other == one else other}")
    return "; ".join(phrases)


def _shown(field: str, value: Any) -> str:
    cut = isinstance(value, str) and (field.endswith("_sha256") or field == "model")
    return spelled(value[:DIGEST] if cut else value)


def _value(protocol: Mapping[str, Any], field: str) -> Any:
    """What a protocol has at a dotted key."""
    return protocol.get(field, flat(protocol).get(field))


def _compared(
    name: str,
    entry: dict[str, Any],
    fidelity: dict[str, Any] | None,
    size: int,
    made: dict[str, Any],
    differs: dict[str, Any],
) -> dict[str, Any]:
    to_data = entry.get("feature_distance") or {}
    to_full = (fidelity or {}).get("feature_distance") or {}
    return {
        "name": name,
        **made,
        "feature_distance_to_reference": to_data.get("value"),
        "feature_distance_to_full": to_full.get("value"),
        "class_agreement": entry.get("class_agreement"),
        "clip_score": (entry.get("clip_score") or {}).get("value"),
        **{key: (fidelity or {}).get(key) for key in OF_FIDELITY},
        "bytes": size,
        **({"differs": differs} if differs else {}),
    }


def _render(
    console: Console,
    rows: Sequence[Mapping[str, Any]],
    protocol: Mapping[str, Any],
    fields: Sequence[str],
) -> None:
    from ..metrics.rows import bits

    title = f"{protocol['num_samples']} samples, same seeds"
    if protocol["network"]:
        title += f"; distances in the features of {protocol['network']}"
    if fields:
        title = f"Not measured alike: {', '.join(fields)}"
    unasked = {key for key in ON_REQUEST if all(row.get(key) is None for row in rows)}
    keys = [key for key in SHOWN if key not in unasked]
    cells = []
    for row in rows:
        width = "float32" if row["name"] == FULL else bits(row) if "weights" in row else MISSING
        differs = [_shown(field, row["differs"][field]) for field in fields]
        cells.append([row["name"], width, *differs, *(_cell(row, key) for key in keys)])
    headings = ["", "bits", *fields, *map(heading, keys)]
    console.table(headings, cells, title)
    explain(headings)


def _cell(row: Mapping[str, Any], key: str) -> str:
    """Pooled decibels are null where all is identical, which a full-precision row has none of."""
    same = key in POOLED and row[key] is None and row["changed"] is not None
    return IDENTICAL if same else cell(key, row[key])
