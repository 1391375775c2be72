"""The commands eval and compare: measure sample sets, put runs side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import artifacts
from ..config import Config
from ..config_files import load_config, parse_config
from ..errors import ArtifactError
from ..files import read_json, write_bytes, write_json
from ..metrics.record import METRICS, differing
from ..run_dir import RunDir, find_run
from ..vocabulary import cell
from .console import Console, finite, keeping
from .measuring import Wishes, protocol_of, protocol_of_images, settle
from .shared import open_model

PARTS = {"protocol", "full", "quantized", "fidelity", "bytes"}
"""Of metrics.json."""
SINGLE = "Single samples in dB: the median, what 5 % lie below, and images below 20 dB PSNR"
COMPARED = (
    *("sqnr_latents_db", "sqnr_median_db", "sqnr_q05_db"),
    *("psnr_db", "psnr_median_db", "psnr_q05_db", "changed"),
)
"""Of `fidelity` in metrics.json, what compare shows."""


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
    from ..stages import evaluate as stage

    start = time.perf_counter()
    if options.images is not None:
        protocol = protocol_of_images(options.wishes)
        metrics = stage.images_only(Path(options.images), protocol, console.track)
        console.result(metrics, lambda: _render_images(console, metrics))
        settle(console, metrics["protocol"]["left_out"], options.wishes)
        return
    run = find_run(options.run_dir)
    config = load_config(str(run.config))
    protocol = protocol_of(options.wishes, config)
    quantized_set = stage.read_set(run.samples(options.name))
    made_from = quantized_set.manifest["digests"].get("quantized")
    if made_from not in (None, artifacts.read(run.tensors("quantized"), "quantized").digest):
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
    full_set = stage.read_set(_full_folder(console, run, config, model, quantized_set))
    coverage = read_json(run.coverage, "qncd quantize --force")
    sizes = stage.sizes(run.tensors("quantized"), coverage)
    suffix = "" if options.name == "quantized" else f"_{options.name}"
    report_path = run.report.with_name(f"report{suffix}.html")
    metrics_path = run.metrics.with_name(f"metrics{suffix}.json")
    earlier = _earlier(metrics_path)
    with keeping("all images are kept, the same command measures them again"):
        metrics, report = stage.run(
            full_set, quantized_set, sizes, protocol, console.track, earlier
        )
    write_json(metrics_path, finite(metrics))
    write_bytes(report_path, report.encode())

    def render() -> None:
        _render_metrics(console, metrics)
        print(f"eval: done in {time.perf_counter() - start:.1f} s, {report_path}")

    console.result({**metrics, "run_dir": str(run.path)}, render)
    settle(console, metrics["protocol"]["left_out"], options.wishes)


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
    from ..stages import chain
    from ..stages import sample as stage
    from ..stages.subject import full_precision

    tree = config.to_dict()
    seeds = quantized_set.seeds
    tree["sampling"] = {**quantized_set.manifest["sampling"], "seed": seeds[0]}
    config = parse_config(tree, str(quantized_set.folder))
    subject = full_precision(model)
    digest = stage.identify(config, model, subject)["digest"]
    own = run.samples("full")
    if own.is_dir():
        manifest = read_json(own / "manifest.json", "qncd sample --full-precision")
        if manifest.get("digest") == digest and set(seeds) <= set(manifest["seeds"]):
            return own
    batch_size = quantized_set.manifest["batch_size"]
    with keeping("images of finished batches are kept, the same command goes on with the next"):
        return chain.full_precision_samples(
            run.path.parent, config, model, seeds, batch_size, console.track
        )


_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
    ("FID", lambda e: e["fid"]),
    ("Frechet distance, packaged features", lambda e: _own(e, "feature_distance")),
    ("inception score", lambda e: e["inception_score"]),
    ("class score, packaged classifier", lambda e: _own(e, "class_score")),
    ("KID", lambda e: e["kid"]),
    ("kernel distance, packaged features", lambda e: _own(e, "kernel_distance")),
    ("precision", lambda e: e["precision"]),
    ("recall", lambda e: e["recall"]),
    ("classified as asked", lambda e: e.get("class_agreement")),
)


def _own(entry: dict[str, Any], key: str) -> Any:
    """A number of the packaged network, None where Inception's name holds it already."""
    found = entry.get(key)
    return None if not found or entry["fid"] is not None else found["value"]


def _render_metrics(console: Console, metrics: dict[str, Any]) -> None:
    full, quantized = metrics["full"], metrics["quantized"]
    rows = [[name, get(full), get(quantized)] for name, get in _ROWS]
    rows = [row for row in rows if row[1] is not None or row[2] is not None]
    fidelity, size = metrics["fidelity"], metrics["bytes"]
    if fidelity["feature_distance"] is not None:
        distance = fidelity["feature_distance"]["value"]
        rows.append(["distance to full precision", 0.0, distance])
    for what, name, pooled in (
        ("SQNR of latents, dB", "sqnr", fidelity["sqnr_latents_db"]),
        ("PSNR of images, dB", "psnr", fidelity["psnr_db"]),
    ):
        rows += [
            [what, None, pooled],
            ["  median", None, cell(f"{name}_median_db", fidelity[f"{name}_median_db"])],
            ["  5 % lie below", None, cell(f"{name}_q05_db", fidelity[f"{name}_q05_db"])],
        ]
    rows += [
        ["changed images, below 20 dB", None, fidelity["changed"]],
        ["bytes of the denoiser", size["full"], size["quantized"]],
    ]
    title = f"{metrics['protocol']['num_samples']} samples, same seeds"
    console.table(["", "full precision", "quantized"], rows, title)


def _render_images(console: Console, metrics: dict[str, Any]) -> None:
    entry = metrics["images"]
    rows = [[name, get(entry)] for name, get in _ROWS]
    rows = [row for row in rows if row[1] is not None]
    console.table(["", "images"], rows, f"{metrics['protocol']['num_samples']} images")


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
    rows = [_compared("full precision", full["full"], None, full["bytes"]["full"])]
    for d, metrics in evaluated.items():
        size = metrics["bytes"]["quantized"]
        rows.append(_compared(Path(d).name, metrics["quantized"], metrics["fidelity"], size))

    def render() -> None:
        columns = ["", "to data", "to full", "as asked"]
        columns += ["SQNR, dB", "PSNR, dB", "bytes", "of float32"]
        cells = [
            [
                r["name"],
                r["feature_distance_to_reference"],
                r["feature_distance_to_full"],
                r["class_agreement"],
                r["sqnr_latents_db"],
                r["psnr_db"],
                r["bytes"],
                r["bytes"] / rows[0]["bytes"],
            ]
            for r in rows
        ]
        protocol = full["protocol"]
        title = f"{protocol['num_samples']} samples, same seeds; SQNR of the final latents"
        if protocol["network"]:
            title += f"; Frechet distances in the features of {protocol['network']}"
        console.table(columns, cells, title)
        columns = ["", *(f"{n}, {q}" for n in ("SQNR", "PSNR") for q in ("median", "5 %"))]
        spread = ("sqnr_median_db", "sqnr_q05_db", "psnr_median_db", "psnr_q05_db")
        cells = [[r["name"], *(cell(k, r[k]) for k in spread), r["changed"]] for r in rows[1:]]
        console.table([*columns, "changed"], cells, SINGLE)

    console.result({"rows": rows, "protocol": full["protocol"]}, render)


def _compared(
    name: str, entry: dict[str, Any], fidelity: dict[str, Any] | None, size: int
) -> dict[str, Any]:
    to_data = entry.get("feature_distance") or {}
    to_full = (fidelity or {}).get("feature_distance") or {}
    return {
        "name": name,
        "feature_distance_to_reference": to_data.get("value"),
        "feature_distance_to_full": to_full.get("value"),
        "class_agreement": entry.get("class_agreement"),
        **{key: fidelity[key] if fidelity else None for key in COMPARED},
        "bytes": size,
    }
