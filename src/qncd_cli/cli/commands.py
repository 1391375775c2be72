"""What the commands do: load, call a stage, write its artifacts, render the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import artifacts
from ..artifacts import Artifact, RunDir
from ..config import Config, load_config, parse_config, shipped_configs
from ..errors import ArtifactError, ConfigError
from .console import Console, show

DEFAULT_NUM = 64


@dataclass(frozen=True)
class SampleOptions:
    steps: int | None
    num: int | None
    seed: int | None
    classes: str | None
    batch_size: int
    scheduler: str | None = None
    eta: float | None = None
    guidance: float | None = None
    inter: str | None = None
    full_precision: bool = False
    name: str | None = None
    overrides: tuple[str, ...] = ()
    run_dir: str | None = None
    force: bool = False


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

    @property
    def metrics(self) -> tuple[str, ...]:
        named = tuple(m for m in ("fid", "isc", "kid", "prc") if getattr(self, m))
        return named or ("fid",)


# ------------------------------------------------------------------ shared


def _open_model(config: Config) -> Any:
    from diffusers.utils import logging

    from ..models.loading import load_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load_model(config.model.source, config.model.dtype)


def _up_to_date(path: Path, kind: str, config: str, model: str) -> Artifact | None:
    """The artifact if it is sound and was made from just these inputs."""
    try:
        artifact = artifacts.read(path, kind)
        artifacts.check_lineage(artifact, config=config, model=model)
    except ArtifactError:
        return None
    return artifact


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.2f} MB"


def _done(console: Console, stage: str, run: RunDir, seconds: float, **more: Any) -> None:
    payload = {"stage": stage, "run_dir": str(run.path), "seconds": round(seconds, 2), **more}

    def render() -> None:
        what = "unchanged, skipped" if more.get("skipped") else f"done in {seconds:.1f} s"
        details = [f"{k} {show(v)}" for k, v in more.items() if k != "skipped"]
        print(f"{stage}: {what}" + (f" ({', '.join(details)})" if details else ""))

    console.result(payload, render)


# ------------------------------------------------------------------ calibrate


def calibrate(
    console: Console,
    config_name: str,
    overrides: Sequence[str],
    run_dir: str | None,
    force: bool,
    dry_run: bool,
) -> RunDir:
    config = load_config(config_name, overrides)
    run = RunDir(Path(run_dir) if run_dir else Path("runs") / Path(config_name).stem)
    if dry_run:
        console.result({"config": config.to_dict()}, lambda: print(config.to_yaml(), end=""))
        return run
    start = time.perf_counter()
    model = _open_model(config)
    digest = config.stage_digest("calibrate")
    calibration = None
    if not force:
        calibration = _up_to_date(run.tensors("calibration"), "calibration", digest, model.digest)
        if not _up_to_date(run.tensors("smoothing"), "smoothing", digest, model.digest):
            calibration = None
    skipped = calibration is not None
    if calibration is None:
        from ..stages import calibrate as stage

        calibration, smoothing = stage.run(config, model, console.track)
        artifacts.write(run.tensors("smoothing"), smoothing)
        artifacts.write(run.tensors("calibration"), calibration)
    artifacts.write_bytes(run.config, config.to_yaml().encode())
    artifacts.set_current(run)
    _done(
        console,
        "calibrate",
        run,
        time.perf_counter() - start,
        rows=calibration.body["rows"],
        layers=len(calibration.body["layers"]),
        skipped=skipped,
    )
    return run


# ------------------------------------------------------------------ quantize


def quantize(console: Console, overrides: Sequence[str], run_dir: str | None, force: bool) -> None:
    start = time.perf_counter()
    run = artifacts.find_run(run_dir)
    config = load_config(str(run.config), overrides)
    model = _open_model(config)
    smoothing = artifacts.read(run.tensors("smoothing"), "smoothing")
    calibration = artifacts.read(run.tensors("calibration"), "calibration")
    digest = config.stage_digest("calibrate")
    artifacts.check_lineage(smoothing, config=digest, model=model.digest)
    parents = {"smoothing": smoothing.digest}
    artifacts.check_lineage(calibration, config=digest, model=model.digest, parents=parents)
    parents = {"calibration": calibration.digest, "smoothing": smoothing.digest}
    skipped = not force and _quantized(run, config, model.digest, parents)
    if not skipped:
        from ..stages import quantize as stage

        result = stage.run(config, model, calibration, smoothing, console.track)
        artifacts.write(run.tensors("quantized"), result.quantized)
        artifacts.write(run.tensors("noise_stats"), result.noise_stats)
        artifacts.write_json(run.coverage, result.coverage)
    if overrides:
        artifacts.write_bytes(run.config, config.to_yaml().encode())
    coverage = artifacts.read_json(run.coverage, "qncd quantize --force")
    size = run.tensors("quantized").stat().st_size
    _done(
        console,
        "quantize",
        run,
        time.perf_counter() - start,
        bytes=size,
        share_of_float32=size / coverage["float_denoiser_bytes"],
        integer_macs_share=coverage["integer_macs_share"],
        skipped=skipped,
    )


def _quantized(run: RunDir, config: Config, model: str, parents: dict[str, str]) -> bool:
    """Whether the stage's outputs are there and sound."""
    digest = config.stage_digest("quantize")
    quantized = _up_to_date(run.tensors("quantized"), "quantized", digest, model)
    noise = _up_to_date(run.tensors("noise_stats"), "noise_stats", digest, model)
    if quantized is None or noise is None or not run.coverage.is_file():
        return False
    return quantized.parents == parents and noise.parents == {"quantized": quantized.digest}


# ------------------------------------------------------------------ sample


def sampling_config(config: Config, options: SampleOptions) -> Config:
    """The run's configuration with the command line's wishes for this one set."""
    tree = config.to_dict()
    sampling = tree["sampling"]
    wishes = {
        "steps": options.steps,
        "seed": options.seed,
        "scheduler": options.scheduler,
        "eta": options.eta,
        "guidance_scale": options.guidance,
    }
    sampling.update({key: value for key, value in wishes.items() if value is not None})
    if options.classes is not None:
        sampling["classes"] = _parse_classes(options.classes)
    if options.inter is not None:
        tree["correction"]["inter"]["method"] = options.inter
    groups = tree["quantization"]["activations"]
    groups["timestep_groups"] = min(groups["timestep_groups"], sampling["steps"])
    return parse_config(tree, "sample")


def _sampled_run(run: RunDir, overrides: Sequence[str]) -> Config:
    """The run's configuration with overrides that sampling can follow. Raises ConfigError."""
    own, config = load_config(str(run.config)), load_config(str(run.config), overrides)
    same = [own.calibration == config.calibration, own.quantization == config.quantization]
    if not all(same) or own.correction.intra != config.correction.intra:
        raise ConfigError(
            "--set: calibration, quantization and correction.intra were settled by earlier stages",
            'set them for "qncd calibrate" or "qncd quantize"',
        )
    return config


def _parse_classes(text: str) -> str | list[int]:
    if text == "all":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--classes {text}: expected numbers with commas between them, or all"
        ) from error


def sample(console: Console, options: SampleOptions) -> Path:
    from ..stages import sample as stage

    start = time.perf_counter()
    run = artifacts.find_run(options.run_dir)
    config = sampling_config(_sampled_run(run, options.overrides), options)
    quantized = noise_stats = None
    if not options.full_precision:
        quantized = artifacts.read(run.tensors("quantized"), "quantized")
        digest = load_config(str(run.config)).stage_digest("quantize")
        artifacts.check_lineage(quantized, config=digest)
        noise_stats = artifacts.read(run.tensors("noise_stats"), "noise_stats")
    model = _open_model(config)
    if quantized is None or noise_stats is None:
        subject = stage.full_precision(model)
    else:
        subject = stage.quantized(model, quantized, noise_stats)
        console.note("backend simulate: fake quantization in float32, slower than full precision")
    folder = run.samples(options.name or subject.kind)
    if options.force:
        stage.clear(folder)
    request = stage.SampleRequest(
        folder, config.sampling.seed, options.num or DEFAULT_NUM, options.batch_size
    )
    manifest = stage.run(config, model, subject, request, console.track)
    _done(
        console,
        "sample",
        run,
        time.perf_counter() - start,
        images=len(manifest["seeds"]),
        folder=str(folder),
        contact_sheet=str(stage.sheet_path(folder)),
    )
    return folder


# ------------------------------------------------------------------ eval


def evaluate(console: Console, options: EvalOptions) -> None:
    from ..stages import evaluate as stage

    start = time.perf_counter()
    if options.images is not None:
        from ..metrics.image import load_images

        images = load_images(Path(options.images))
        source = options.reference or "zoo"
        protocol = _protocol(options, source, packaged_model=source == "zoo")
        metrics = stage.images_only(images, options.images, protocol)
        console.result(metrics, lambda: _render_images(console, metrics))
        return
    run = artifacts.find_run(options.run_dir)
    config = load_config(str(run.config))
    quantized_set = stage.read_set(run.samples(options.name))
    made_from = quantized_set.manifest["digests"].get("quantized")
    if made_from not in (None, artifacts.read(run.tensors("quantized"), "quantized").digest):
        raise ArtifactError(
            f"{quantized_set.folder}: sampled from another quantized model than this run's",
            'repeat "qncd sample" with --force',
        )
    model = _open_model(config)
    if quantized_set.manifest["digests"]["model"] != model.digest:
        raise ArtifactError(
            f"{quantized_set.folder}: sampled from another model than {model.source} is now",
            'repeat "qncd calibrate", "qncd quantize" and "qncd sample --force"',
        )
    source = options.reference or config.evaluation.reference
    protocol = _protocol(options, source, config.model.source.startswith("zoo:"))
    full_set = stage.read_set(_full_folder(console, run, config, model, quantized_set))
    sizes = {
        "full": model.denoiser_bytes(),
        "quantized": run.tensors("quantized").stat().st_size,
    }
    metrics, report = stage.run(full_set, quantized_set, sizes, protocol)
    suffix = "" if options.name == "quantized" else f"_{options.name}"
    report_path = run.report.with_name(f"report{suffix}.html")
    from .console import finite

    artifacts.write_json(run.metrics.with_name(f"metrics{suffix}.json"), finite(metrics))
    artifacts.write_bytes(report_path, report.encode())

    def render() -> None:
        _render_metrics(console, metrics)
        print(f"eval: done in {time.perf_counter() - start:.1f} s, {report_path}")

    console.result({**metrics, "run_dir": str(run.path)}, render)


def _protocol(options: EvalOptions, source: str, packaged_model: bool) -> Any:
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
    """Full-precision samples for the seeds and settings of a quantized set; drawn if missing.

    They belong to the model and the sampler, not to one run, so that runs beside each other
    share them: <runs>/full-precision/<digest>.
    """
    from ..stages import sample as stage

    tree = config.to_dict()
    seeds = quantized_set.seeds
    tree["sampling"] = {**quantized_set.manifest["sampling"], "seed": seeds[0]}
    config = parse_config(tree, str(quantized_set.folder))
    subject = stage.full_precision(model)
    digest = stage.identify(config, model, subject)["digest"]
    own = run.samples("full")
    if own.is_dir():
        manifest = artifacts.read_json(own / "manifest.json", "qncd sample --full-precision")
        if manifest.get("digest") == digest and set(seeds) <= set(manifest["seeds"]):
            return own
    folder = run.path.parent / "full-precision" / digest
    count = seeds[-1] - seeds[0] + 1
    request = stage.SampleRequest(folder, seeds[0], count, quantized_set.manifest["batch_size"])
    stage.run(config, model, subject, request, console.track)
    return folder


_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
    ("FID", lambda e: e["fid"]),
    ("Frechet distance, packaged features", lambda e: _own(e, "feature_distance")),
    ("inception score", lambda e: e["inception_score"]),
    ("class score, packaged classifier", lambda e: _own(e, "class_score")),
    ("KID", lambda e: e["kid"]),
    ("kernel distance, packaged features", lambda e: _own(e, "kernel_distance")),
    ("precision", lambda e: e["precision"]),
    ("recall", lambda e: e["recall"]),
    ("classified as asked", lambda e: e.get("classified_as_asked")),
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


# ------------------------------------------------------------------ run, compare


def run_all(
    console: Console,
    config_name: str,
    overrides: Sequence[str],
    run_dir: str | None,
    force: bool,
    options: dict[str, Any],
) -> None:
    """The four commands one after the other; with --json only the last one's object."""
    quiet = _Quiet() if console.as_json else console
    run = calibrate(quiet, config_name, overrides, run_dir, force, False)
    where = str(run.path)
    quantize(quiet, (), where, force)
    drawing = {k: options[k] for k in ("steps", "num", "seed", "classes", "batch_size")}
    if drawing["num"] is None:
        drawing["num"] = load_config(str(run.config)).evaluation.num_samples
    sample(quiet, SampleOptions(**drawing, run_dir=where, force=force))
    measuring = {k: v for k, v in options.items() if k not in drawing}
    evaluate(console, EvalOptions(**measuring, run_dir=where))


class _Quiet(Console):
    """A console whose results nobody reads."""

    def result(self, payload: dict[str, Any], render: Callable[[], None]) -> None:
        return None


def compare(console: Console, run_dirs: Sequence[str]) -> None:
    """Rows of several runs. Raises ArtifactError when they were measured differently."""
    evaluated = {
        d: artifacts.read_json(RunDir(Path(d)).metrics, f"qncd eval --run-dir {d}")
        for d in run_dirs
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
        columns = ["", "distance to data", "distance to full", "as asked"]
        columns += ["SQNR latents, dB", "PSNR, dB", "bytes", "of float32"]
        cells = [
            [
                r["name"],
                r["feature_distance_to_reference"],
                r["feature_distance_to_full"],
                r["classified_as_asked"],
                r["sqnr_latents_db"],
                r["psnr_db"],
                r["bytes"],
                r["bytes"] / rows[0]["bytes"],
            ]
            for r in rows
        ]
        title = f"{full['protocol']['num_samples']} samples, same seeds; "
        console.table(columns, cells, title + f"features: {full['protocol']['network']}")

    console.result({"rows": rows, "protocol": full["protocol"]}, render)


def _compared(
    name: str, entry: dict[str, Any], fidelity: dict[str, Any] | None, size: int
) -> dict[str, Any]:
    distance = entry.get("feature_distance") or {}
    return {
        "name": name,
        "feature_distance_to_reference": distance.get("value"),
        "feature_distance_to_full": fidelity["feature_distance"]["value"] if fidelity else None,
        "classified_as_asked": entry.get("classified_as_asked"),
        "sqnr_latents_db": fidelity["sqnr_latents_db"] if fidelity else None,
        "psnr_db": fidelity["psnr_db"] if fidelity else None,
        "bytes": size,
    }


# ------------------------------------------------------------------ inspect, models


def inspect(console: Console, file: str) -> None:
    artifact = artifacts.read(Path(file))
    tensors = {
        name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
        for name, t in artifact.tensors.items()
    }
    payload = {
        "kind": artifact.kind,
        "digest": artifact.digest,
        "config": artifact.config,
        "model": artifact.model,
        "parents": artifact.parents,
        "body": artifact.body,
        "tensors": tensors,
    }

    def render() -> None:
        print(f"{file}: {artifact.kind}, {_size(Path(file))}, content {artifact.digest[:16]}")
        print(f"model {artifact.model}, configuration {artifact.config or '-'}")
        for name, digest in artifact.parents.items():
            print(f"made from {name} {digest[:16]}")
        rows = [[n, t["dtype"], str(t["shape"])] for n, t in tensors.items()]
        console.table(["tensor", "dtype", "shape"], rows)

    console.result(payload, render)


def models(console: Console) -> None:
    from ..models.zoo import training_record, zoo_models

    configs = {}
    for name, path in shipped_configs().items():
        config = load_config(str(path))
        q = config.quantization
        configs[name] = {
            "model": config.model.source,
            "bits": f"W{q.weights.bits}A{q.activations.bits}",
            "sampler": f"{config.sampling.scheduler}, {config.sampling.steps} steps",
        }
    packaged = {name: training_record(name) for name in zoo_models()}

    def render() -> None:
        rows = []
        for name, record in packaged.items():
            date = record.get("unet", {}).get("date", "")
            rows.append([f"zoo:{name}", date, _size_of_folder(zoo_models()[name])])
        console.table(["packaged model", "trained", "size"], rows)
        cells = [[n, c["bits"], c["model"], c["sampler"]] for n, c in configs.items()]
        console.table(["configuration", "bits", "model", "sampler"], cells)

    console.result({"models": packaged, "configs": configs}, render)


def _size_of_folder(folder: Path) -> str:
    return f"{sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) / 1e6:.1f} MB"
