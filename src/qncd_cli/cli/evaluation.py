"""The commands eval and compare: measure sample sets, put runs side by side."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..config.loading import load_config, parse_config
from ..config.schema import Config
from ..errors import ArtifactError
from ..lineage.measured import Measurement
from ..metrics.record import METRICS, differing
from ..metrics.rows import OF_FIDELITY, POOLED
from ..store.artifact_files import read_stored
from ..store.files import read_json, write_bytes, write_json
from ..store.run_dir import RunDir, find_run, read_coverage
from ..vocabulary import IDENTICAL, MISSING, NUMBERS, cell, heading, interval
from .console import Console, finite, keeping
from .measuring import Wishes, explain, protocol_of, protocol_of_images, settle
from .shared import open_model
from .states import model_digest

PARTS = {"protocol", "full", "quantized", "fidelity", "bytes"}
"""Objects that metrics.json holds where it compares two sets."""
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
        metrics = stage.images_only(Path(options.images), protocol, console.track)
        title = f"{metrics['protocol']['num_samples']} images"
        console.result(metrics, lambda: render(console, metrics, title))
        settle(console, metrics["protocol"]["left_out"], options.wishes)
        return
    run = find_run(options.run_dir)
    config = load_config(str(run.config))
    work = _measurement(run, config, options)
    if work is not None and (found := work.still_holds()) is not None:
        _show(console, run, found, f"eval: unchanged, skipped, {work.report}")
        settle(console, found["protocol"]["left_out"], options.wishes)
        return
    from ..lineage.sample_set import read_set
    from ..stages import evaluate as stage

    protocol = protocol_of(options.wishes, config)
    quantized_set = read_set(run.samples(options.name))
    made_from = quantized_set.manifest["digests"].get("quantized")
    if made_from not in (None, read_stored(run.tensors("quantized"), "quantized").digest):
        raise ArtifactError(
            f"{quantized_set.folder}: sampled from another quantized model than this run's",
            'repeat "qncd sample" with --force',
        )
    model = open_model(config, options.device, run.path)
    if quantized_set.manifest["digests"]["model"] != model.digest:
        raise ArtifactError(
            f"{quantized_set.folder}: sampled from another model than {model.source} is now",
            'repeat "qncd calibrate", "qncd quantize" and "qncd sample --force"',
        )
    full_set = read_set(_full_folder(console, run, config, model, quantized_set))
    coverage = read_coverage(run.coverage)
    sizes = stage.sizes(run.tensors("quantized"), coverage)
    metrics_path, report_path = _outputs(run, options.name)
    earlier = _earlier(metrics_path)
    with keeping("all images are kept, the same command measures them again"):
        metrics, report = stage.run(
            full_set,
            quantized_set,
            sizes,
            protocol,
            console.track,
            earlier,
            made=_made(config, coverage),
            facts=_facts(),
        )
    write_json(metrics_path, finite(metrics))
    write_bytes(report_path, report.encode())
    if work is not None:
        work.note(full_set.folder)
    _show(console, run, metrics, f"eval: done in {console.lap():.1f} s, {report_path}")
    settle(console, metrics["protocol"]["left_out"], options.wishes)


def _show(console: Console, run: RunDir, metrics: dict[str, Any], last: str) -> None:
    def show() -> None:
        render(console, metrics, f"{metrics['protocol']['num_samples']} samples, same seeds")
        print(last)

    console.result({**metrics, "run_dir": str(run.path)}, show)


def _outputs(run: RunDir, name: str) -> tuple[Path, Path]:
    """metrics.json and the report of a sample set."""
    suffix = "" if name == "quantized" else f"_{name}"
    metrics, report = f"metrics{suffix}.json", f"report{suffix}.html"
    return run.metrics.with_name(metrics), run.report.with_name(report)


def _measurement(run: RunDir, config: Config, options: EvalOptions) -> Measurement | None:
    """None where only loading the model tells which one it is."""
    model, wishes = model_digest(config), options.wishes
    if model is None:
        return None
    asked = {**asdict(wishes), "source": config.model.source, "config": config.to_yaml()}
    weights = Path(wishes.inception_weights) if wishes.inception_weights else None
    reference = wishes.reference or config.evaluation.reference
    return Measurement(
        run,
        options.name,
        asked,
        model,
        reference,
        weights,
        wishes.insists,
        *_outputs(run, options.name),
    )


def _earlier(path: Path) -> dict[str, Any]:
    """metrics.json as it is, empty where it is missing or damaged: it is replaced then."""
    try:
        found = read_json(path, "qncd eval")
    except ArtifactError:
        return {}
    return found if _whole(found) else {}


def _whole(metrics: Any) -> bool:
    """Whether it is the metrics.json of two sets."""
    return isinstance(metrics, dict) and all(isinstance(metrics.get(k), dict) for k in PARTS)


def _full_folder(
    console: Console, run: RunDir, config: Config, model: Any, quantized_set: Any
) -> Path:
    """Full-precision samples for the seeds and settings of a quantized set; drawn if missing."""
    from ..runtime.sampled_model import SampledModel
    from ..stages import pipeline
    from ..stages import sample as stage

    tree = config.to_dict()
    seeds = quantized_set.seeds
    tree["sampling"] = {**quantized_set.manifest["sampling"], "seed": seeds[0]}
    config = parse_config(tree, str(quantized_set.folder))
    sampled = SampledModel.full_precision(model)
    digest = stage.identify(config, model, sampled)["digest"]
    own = run.samples("full")
    if own.is_dir():
        manifest = read_json(own / "manifest.json", "qncd sample --full-precision")
        if manifest.get("digest") == digest and set(seeds) <= set(manifest["seeds"]):
            return own
    batch_size = quantized_set.manifest["batch_size"]
    with keeping("images of finished batches are kept, the same command goes on with the next"):
        return pipeline.full_precision_samples(
            run.path.parent, config, model, seeds, batch_size, console.track
        )


def _made(config: Config, coverage: dict[str, Any]) -> dict[str, Any]:
    """How the model was quantized, for metrics.json: preset, the label's bits, and where
    coverage.json has them the means over all multiplications and bit operations."""
    known = ("mean_weight_bits", "mean_input_bits", "bit_operations")
    return {
        "preset": config.quantization.preset,
        "weights": config.quantization.weights.bits,
        "activations": config.quantization.activations.bits,
        **{key: coverage.get(key) for key in known},
    }


def _facts() -> dict[str, Any]:
    """Facts about the measurement, for the report."""
    from .. import machine

    return {
        "version": f"qncd {__version__}",
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "CPU": machine.described()["cpu"],
        "command": shlex.join(["qncd", *sys.argv[1:]]),
    }


def render(console: Console, metrics: dict[str, Any], title: str) -> None:
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
        whole = _whole(metrics)
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
