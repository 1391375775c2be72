"""A run directory: its stages, what they left, and what of it is stale."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..config.loading import load_config
from ..config.schema import Config
from ..errors import ArtifactError, QncdError
from ..lineage import freshness, sample_sets
from ..runs.model import model_digest
from ..store.artifact_files import read_stored
from ..store.files import read_json
from ..store.run_dir import RunDir
from ..vocabulary import MISSING, heading
from ..vocabulary import cell as said
from .console import Console

KINDS = {"calibrate": ("smoothing", "calibration"), "quantize": ("quantized", "noise_stats")}


def inspect(console: Console, folder: Path) -> None:
    """Raises ArtifactError for a folder that is no run."""
    run = RunDir(folder)
    if not run.config.is_file():
        raise ArtifactError(
            f"{folder}: no run, it has no {run.config.name}",
            "give a run directory (runs/NAME), or a file of one",
        )
    config = load_config(str(run.config))
    model, unknown = _model(config)
    found = freshness.of_run(run, config, model or _model_of(run))
    stages = [
        _stage(state.stage, state.why or "holds", [run.tensors(k) for k in KINDS[state.stage]])
        for state in found
    ]
    quantized = found[1].found.get("quantized")
    digest = quantized.digest if quantized is not None else None
    for manifest in sorted(folder.glob(f"samples/*/{sample_sets.MANIFEST}")):
        stages.append(_samples(manifest, digest))
    for metrics in sorted(folder.glob("metrics*.json")):
        stages.append(_measured(metrics, digest))

    def render() -> None:
        bits = config.quantization.widths.label
        print(f"{folder}: {config.model.source}, {bits}, preset {config.quantization.preset}")
        rows = [
            [row["stage"], row["state"], row["date"] or MISSING, said("bytes", row["bytes"])]
            for row in stages
        ]
        console.table(["stage", "state", "made", heading("bytes")], rows)
        if unknown:
            print(f"the model itself was not looked at: {unknown}")

    console.result({"kind": "run", "run_dir": str(folder), "stages": stages}, render)


def _model(config: Config) -> tuple[str | None, str]:
    """The model's digest as it is now, or None and why it is not known."""
    try:
        digest = model_digest(config)
    except QncdError as error:
        return None, error.message
    return digest, "" if digest is not None else "only loading it tells whether it changed"


def _model_of(run: RunDir) -> str:
    """The digest of the model that the run was made from, where nothing else is known."""
    for kind in ("quantized", "calibration"):
        try:
            return read_stored(run.tensors(kind), kind).model
        except ArtifactError:
            continue
    return ""


def _stage(name: str, state: str, files: Iterable[Path]) -> dict[str, Any]:
    """A line of the table. files: what the stage leaves."""
    there = [path.stat() for path in files if path.is_file()]
    date = max((entry.st_mtime for entry in there), default=None)
    return {
        "stage": name,
        "state": state,
        "bytes": sum(entry.st_size for entry in there),
        "date": None if date is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(date)),
    }


def _samples(path: Path, quantized: str | None) -> dict[str, Any]:
    """A sample set. quantized: digest of the run's artifact as it is now."""
    name = f"sample {path.parent.name}"
    files = _files(path.parent)
    try:
        manifest = read_json(path, "qncd sample --force")
        made_from, seeds = manifest["digests"].get("quantized"), manifest["seeds"]
    except (ArtifactError, KeyError, TypeError, AttributeError):
        return _stage(name, "its manifest is damaged", files)
    state = f"{len(seeds)} images"
    if not manifest.get("complete"):
        state += ", not finished"
    if made_from not in (None, quantized):
        state += ", stale: of another quantized model"
    return _stage(name, state, files)


def _measured(path: Path, quantized: str | None) -> dict[str, Any]:
    """What eval wrote."""
    name = f"eval {path.stem.removeprefix('metrics').lstrip('_')}".rstrip()
    try:
        protocol = read_json(path, "qncd eval")["protocol"]
        count, made_from = protocol["num_samples"], protocol.get("artifact")
    except (ArtifactError, KeyError, TypeError, AttributeError):
        return _stage(name, "damaged", [path])
    state = f"{count} images"
    if made_from not in (None, quantized):
        state += ", stale: of another quantized model"
    return _stage(name, state, [path, path.with_name(path.name.replace("metrics", "report"))])


def _files(folder: Path) -> Sequence[Path]:
    return sorted(folder.iterdir())
