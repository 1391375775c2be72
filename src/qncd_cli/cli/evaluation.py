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
from ..run_dir import RunDir, find_run
from .console import Console, finite, keeping
from .shared import open_model


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
    def metrics(self) -> tuple[str, ...]:
        named = tuple(m for m in ("fid", "isc", "kid", "prc") if getattr(self, m))
        return named or ("fid",)


def evaluate(console: Console, options: EvalOptions) -> None:
    from ..stages import evaluate as stage

    start = time.perf_counter()
    if options.images is not None:
        from ..metrics.image import load_images

        images = load_images(Path(options.images))
        source = options.reference or "zoo"
        protocol = protocol_of(options, source, packaged_model=source == "zoo")
        metrics = stage.images_only(images, options.images, protocol, console.track)
        console.result(metrics, lambda: _render_images(console, metrics))
        return
    run = find_run(options.run_dir)
    config = load_config(str(run.config))
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
    source = options.reference or config.evaluation.reference
    protocol = protocol_of(options, source, config.model.source.startswith("zoo:"))
    full_set = stage.read_set(_full_folder(console, run, config, model, quantized_set))
    coverage = read_json(run.coverage, "qncd quantize --force")
    sizes = stage.sizes(run.tensors("quantized"), coverage)
    with keeping("all images are kept, the same command measures them again"):
        metrics, report = stage.run(full_set, quantized_set, sizes, protocol, console.track)
    suffix = "" if options.name == "quantized" else f"_{options.name}"
    report_path = run.report.with_name(f"report{suffix}.html")
    write_json(run.metrics.with_name(f"metrics{suffix}.json"), finite(metrics))
    write_bytes(report_path, report.encode())

    def render() -> None:
        _render_metrics(console, metrics)
        print(f"eval: done in {time.perf_counter() - start:.1f} s, {report_path}")

    console.result({**metrics, "run_dir": str(run.path)}, render)


def protocol_of(options: EvalOptions, source: str, packaged_model: bool) -> Any:
    from ..metrics.image import inception, load_reference, packaged
    from ..stages.evaluate import Protocol

    name = options.network
    if name == "auto":
        fashion = packaged_model and options.inception_weights is None
        name = "fashion" if fashion else "inception"
    weights = Path(options.inception_weights) if options.inception_weights else None
    network = packaged() if name == "fashion" else inception(weights)
    needed = set(options.metrics) - {"isc"}
    return Protocol(options.metrics, network, load_reference(source) if needed else None)


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
    count = seeds[-1] - seeds[0] + 1
    batch_size = quantized_set.manifest["batch_size"]
    with keeping("images of finished batches are kept, the same command goes on with the next"):
        return chain.full_precision_samples(
            run.path.parent, config, model, count, batch_size, console.track
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
    rows += [
        ["distance to full precision", 0.0, fidelity["feature_distance"]["value"]],
        ["SQNR of latents, dB", None, fidelity["sqnr_latents_db"]],
        ["PSNR of images, dB", None, fidelity["psnr_db"]],
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
    keys = ("network_sha256", "reference", "num_samples", "sampling", "first_seed", "metrics")
    for d, metrics in evaluated.items():
        if not {"protocol", "full", "quantized", "fidelity", "bytes"} <= metrics.keys():
            raise ArtifactError(
                f"{RunDir(Path(d)).metrics}: damaged", f'repeat "qncd eval --run-dir {d}"'
            )
    first, *others = evaluated.items()
    for name, metrics in others:
        differing = [k for k in keys if metrics["protocol"][k] != first[1]["protocol"][k]]
        if differing:
            raise ArtifactError(
                f"{first[0]} and {name} were measured in different protocols"
                f" ({', '.join(differing)})",
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
        title = f"{protocol['num_samples']} samples, same seeds; Frechet distances in the "
        title += f"features of {protocol['network']}, SQNR of the final latents"
        console.table(columns, cells, title)

    console.result({"rows": rows, "protocol": full["protocol"]}, render)


def _compared(
    name: str, entry: dict[str, Any], fidelity: dict[str, Any] | None, size: int
) -> dict[str, Any]:
    distance = entry.get("feature_distance") or {}
    return {
        "name": name,
        "feature_distance_to_reference": distance.get("value"),
        "feature_distance_to_full": fidelity["feature_distance"]["value"] if fidelity else None,
        "class_agreement": entry.get("class_agreement"),
        "sqnr_latents_db": fidelity["sqnr_latents_db"] if fidelity else None,
        "psnr_db": fidelity["psnr_db"] if fidelity else None,
        "bytes": size,
    }
