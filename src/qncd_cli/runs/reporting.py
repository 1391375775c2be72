"""Writing a run's report: from its artifacts, its sets and everything measured in it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..config.schema import Config
from ..errors import ArtifactError
from ..metrics.record import differing
from ..store.files import read_json, write_bytes
from ..store.run_dir import RunDir
from .study import read_tally

if TYPE_CHECKING:
    from ..lineage.sample_set import SampleSet
    from ..store.artifacts import Artifact

KINDS = ("quantized", "noise_stats", "smoothing", "calibration")
"""Artifacts that a report reads."""
BENCH = "bench.json"
PARTS = {"protocol", "full", "quantized", "fidelity", "bytes"}
"""Objects that metrics.json holds where it compares two sets."""


def write_report(
    run: RunDir,
    config: Config,
    sets: tuple[SampleSet, SampleSet],
    metrics: Mapping[str, Any],
    coverage: Mapping[str, Any],
    outputs: tuple[Path, Path, Path],
    command: str,
) -> None:
    """Write the page and the sheet of pairs of two sets that metrics.json is of.

    sets: full precision, quantized; outputs: places of metrics.json, the page and the sheet;
    command: what measured. Raises ArtifactError for a damaged tally of a study.
    """
    from ..stages import reporting as stage

    own, page, sheet = outputs
    full, quantized = sets
    sources = stage.Sources(
        _artifacts(run),
        coverage,
        _facts(command),
        _others(run, own, metrics),
        _commands(run, config, quantized, command),
        read_tally(run),
        read_bench(run, config.model.source),
    )
    report, pairs = stage.run(full, quantized, metrics, sources)
    write_bytes(sheet, pairs)
    write_bytes(page, report.encode())


def bench_files(run: RunDir) -> list[Path]:
    """Tables of `qncd bench` in the run's folder and beside it, in order of preference."""
    return [run.path / BENCH, *sorted(run.path.parent.glob(f"bench_*/{BENCH}"))]


def read_bench(run: RunDir, source: str) -> dict[str, Any] | None:
    """The first of them that is about the model of this source and this machine."""
    for path in bench_files(run):
        try:
            found = read_json(path, "qncd bench")
        except ArtifactError:
            continue
        known = isinstance(found, dict) and isinstance(found.get("rows"), list)
        if known and found.get("model") == source and _is_here(found):
            return found
    return None


def _is_here(found: Mapping[str, Any]) -> bool:
    """Whether it was measured on this machine."""
    from .. import machine

    here: bool = found.get("machine") == machine.described()
    return here


def is_whole(metrics: Any) -> bool:
    """Whether it is the metrics.json of two sets."""
    return isinstance(metrics, dict) and all(isinstance(metrics.get(k), dict) for k in PARTS)


def _artifacts(run: RunDir) -> dict[str, Artifact]:
    """Those that are there and sound. What smoothing did is read only where it did something."""
    from ..store import artifacts

    found: dict[str, Artifact] = {}
    for kind in KINDS:
        if kind == "calibration" and not ("smoothing" in found and found["smoothing"].tensors):
            continue
        try:
            found[kind] = artifacts.read(run.tensors(kind), kind)
        except ArtifactError:
            continue
    return found


def _others(run: RunDir, own: Path, metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Name -> metrics.json of the run's further sets that were measured in the same protocol."""
    found = {}
    for path in sorted(run.path.glob("metrics*.json")):
        if path.name == own.name:
            continue
        try:
            other = read_json(path, "qncd eval")
        except ArtifactError:
            continue
        alike = is_whole(other) and not differing(metrics["protocol"], other["protocol"])
        if alike and other["protocol"].get("artifact") == metrics["protocol"].get("artifact"):
            found[path.stem.removeprefix("metrics").removeprefix("_") or "quantized"] = other
    return found


def _commands(run: RunDir, config: Config, quantized: SampleSet, command: str) -> list[str]:
    """Command lines that make and measure the set again from the run's configuration."""
    where = ["--run-dir", str(run.path)]
    seeds, manifest = quantized.seeds, quantized.manifest
    drawing = ["--num", str(len(seeds)), "--batch-size", str(manifest["batch_size"])]
    if quantized.folder.name != "quantized":
        drawing += ["--name", quantized.folder.name]
    tree = config.to_dict()
    wanted = {f"sampling.{k}": v for k, v in manifest["sampling"].items()}
    correction = manifest.get("correction") or {}
    wanted |= {f"correction.inter.{k}": v for k, v in correction.items()}
    wanted["sampling.seed"] = seeds[0]
    for key, value in wanted.items():
        now = _at(tree, key)
        if key.startswith("sampling.") and now != value or key.endswith(".method") and now != value:
            drawing += ["--set", f"{key}={value}"]
    if seeds != list(range(seeds[0], seeds[0] + len(seeds))):
        drawing = ["# of several ranges of seeds:", *drawing]
    lines = [
        ["qncd", "calibrate", "--config", str(run.config), *where],
        ["qncd", "quantize", *where],
        ["qncd", "sample", *drawing, *where],
    ]
    return [*(" ".join(map(_quoted, line)) for line in lines), command]


def _quoted(word: str) -> str:
    return word if word.startswith("# ") else shlex.quote(word)


def _at(tree: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None  # type: ignore[assignment]
    return list(tree) if isinstance(tree, tuple) else tree


def _facts(command: str) -> dict[str, Any]:
    """Facts about the measurement, for the report."""
    from .. import machine

    return {
        "version": f"qncd {__version__}",
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "CPU": machine.described()["cpu"],
        "command": command,
    }
