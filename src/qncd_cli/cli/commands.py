"""What the commands do: load, call a stage, write its artifacts, render the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import artifacts
from ..config import Config
from ..config_files import load_config, parse_config
from ..errors import ConfigError
from ..files import read_json, write_bytes
from ..run_dir import RunDir, find_run, set_current
from ..vocabulary import phrase
from .console import Console, keeping
from .evaluation import EvalOptions, evaluate
from .measuring import check
from .shared import download, note_sampling, open_model
from .wanted import Wanted

DEFAULT_NUM = 64
DRAWING = ("steps", "num", "seed", "classes", "prompts", "batch_size", "backend")
"""Options of `run` that say what to sample."""


@dataclass(frozen=True)
class SampleOptions:
    steps: int | None
    num: int | None
    seed: int | None
    classes: str | None
    prompts: tuple[str, ...]
    batch_size: int | None
    scheduler: str | None = None
    eta: float | None = None
    guidance: float | None = None
    inter: str | None = None
    full_precision: bool = False
    backend: str = "auto"
    compiled: bool | None = None
    low_memory: bool = False
    name: str | None = None
    overrides: tuple[str, ...] = ()
    run_dir: str | None = None
    device: str = "auto"
    force: bool = False


# ------------------------------------------------------------------ shared


def _done(console: Console, stage: str, run: RunDir, seconds: float, **more: Any) -> None:
    payload = {"stage": stage, "run_dir": str(run.path), "seconds": round(seconds, 2), **more}

    def render() -> None:
        what = "unchanged, skipped" if more.get("skipped") else f"done in {seconds:.1f} s"
        details = [phrase(k, v) for k, v in more.items() if k != "skipped"]
        print(f"{stage}: {what}" + (f" ({', '.join(details)})" if details else ""))

    console.result(payload, render)


# ------------------------------------------------------------------ calibrate


def calibrate(
    console: Console, wanted: Wanted, device: str, *, force: bool, dry_run: bool = False
) -> RunDir:
    config = wanted.config(None if dry_run else download)
    run = RunDir(wanted.folder)
    if dry_run:
        console.result({"config": config.to_dict()}, lambda: print(config.to_yaml(), end=""))
        return run
    from ..stages import chain

    start = time.perf_counter()
    with keeping("nothing of calibrate is kept, the same command begins it again"):
        model = open_model(config, device, run.path)
        note_sampling(console, config, model)
        calibration, _, skipped = chain.calibrate(run, config, model, console.track, force=force)
    write_bytes(run.config, config.to_yaml().encode())
    set_current(run)
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


def quantize(
    console: Console, overrides: Sequence[str], run_dir: str | None, device: str, *, force: bool
) -> None:
    from ..stages import chain

    start = time.perf_counter()
    run = find_run(run_dir)
    config = load_config(str(run.config), overrides)
    model = open_model(config, device, run.path)
    smoothing = artifacts.read(run.tensors("smoothing"), "smoothing")
    calibration = artifacts.read(run.tensors("calibration"), "calibration")
    digest = config.stage_digest("calibrate")
    artifacts.check_lineage(smoothing, config=digest, model=model.digest)
    parents = {"smoothing": smoothing.digest}
    artifacts.check_lineage(calibration, config=digest, model=model.digest, parents=parents)
    with keeping("calibrate is kept, nothing of quantize is; the same command begins it again"):
        skipped = chain.quantize(
            run, config, model, calibration, smoothing, console.track, force=force
        )
    if overrides:
        write_bytes(run.config, config.to_yaml().encode())
    coverage = read_json(run.coverage, "qncd quantize --force")
    artifact_bytes = run.tensors("quantized").stat().st_size
    size = artifact_bytes + coverage["rest_bytes"]
    _done(
        console,
        "quantize",
        run,
        time.perf_counter() - start,
        bytes=size,
        artifact_bytes=artifact_bytes,
        share_of_float32=size / coverage["float_denoiser_bytes"],
        integer_macs_share=coverage["integer_macs_share"],
        average_weight_bits=coverage["average_weight_bits"],
        mean_weight_bits=coverage["mean_weight_bits"],
        mean_input_bits=coverage["mean_input_bits"],
        skipped=skipped,
    )


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
    if options.prompts:
        sampling["prompts"] = list(options.prompts)
    if options.inter is not None:
        tree["correction"]["inter"]["method"] = options.inter
    groups = tree["quantization"]["activations"]
    groups["timestep_groups"] = min(groups["timestep_groups"], sampling["steps"])
    return parse_config(tree, "sample")


def _sampled_run(run: RunDir, own: Config, overrides: Sequence[str]) -> Config:
    """The run's own configuration with overrides that sampling can follow. Raises ConfigError."""
    if not overrides:
        return own
    config = load_config(str(run.config), overrides)
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
    from ..backends.base import AUTO
    from ..stages import fastest, set_files
    from ..stages import sample as stage
    from ..stages import subject as subjects
    from ..stages.graphs import FOLDER

    start = time.perf_counter()
    run = find_run(options.run_dir)
    own = load_config(str(run.config))
    config = sampling_config(_sampled_run(run, own, options.overrides), options)
    quantized = noise_stats = None
    if not options.full_precision:
        quantized = artifacts.read(run.tensors("quantized"), "quantized")
        artifacts.check_lineage(quantized, config=own.stage_digest("quantize"))
        noise_stats = artifacts.read(run.tensors("noise_stats"), "noise_stats")
    in_full = "full_compiled" if options.compiled else "full"  # eval compares with the plain one
    folder = run.samples(options.name or (in_full if options.full_precision else "quantized"))
    begun = None if options.force else set_files.begun(folder)
    model = open_model(config, options.device, run.path)
    little = options.low_memory
    backend = fastest.of_set(options.backend, begun, model.device, low_memory=little)
    if quantized is None or noise_stats is None:
        subject = subjects.full_precision(model)
    else:
        subject = subjects.quantized(
            model, quantized, noise_stats, backend, low_memory=little, in_place=True
        )
    if config.sampling != own.sampling:
        note_sampling(console, config, model)
    macs = _macs(run, config, model, subject.kind)
    first, count = config.sampling.seed, options.num or DEFAULT_NUM
    batch_size = options.batch_size or set_files.default_batch(macs)
    request = stage.SampleRequest(folder, list(range(first, first + count)), batch_size)
    if options.force:
        stage.check(config, model, subject, request)
        set_files.clear(folder)
    how = subjects.Compiling(
        run.path / FOLDER,
        console.note,
        macs,
        False if little else options.compiled,
        bool(begun.get("compiled", False)) if begun else None,
    )
    subject = subjects.compiled(config, model, subject, request.seeds, how)
    if backend == AUTO:
        place = fastest.Place(how.folder, subject.digests, little, graphs=not little)
        drawn = request.seeds, request.batch_size
        subject = fastest.chosen(config, model, subject, *drawn, how, place)
    _note_backend(console, subject)
    with keeping("images of finished batches are kept, the same command goes on with the next"):
        manifest = stage.run(config, model, subject, request, console.track)
    there, asked = len(manifest["seeds"]), len(request.seeds)
    if there > asked:
        console.note(f"{folder}: {there} images are there, {asked} asked for: all are kept")
    _done(
        console,
        "sample",
        run,
        time.perf_counter() - start,
        images=there,
        folder=str(folder),
        contact_sheet=str(set_files.sheet_path(folder)),
    )
    return folder


def _macs(run: RunDir, config: Config, model: Any, kind: str) -> int:
    """Of one call on one sample."""
    from ..stages.assemble import denoiser_costs

    if kind == "quantized" or run.coverage.is_file():
        return int(read_json(run.coverage, "qncd quantize --force")["macs"])
    return sum(cost.macs for cost in denoiser_costs(config, model))


def _note_backend(console: Console, subject: Any) -> None:
    if subject.backend is None:
        return
    console.note(f"backend {subject.backend.name}: {subject.backend.remark}")
    fallbacks = subject.fallbacks()
    for name, why in list(fallbacks.items())[:1]:
        console.note(f"{len(fallbacks)} layers are simulated in float32 (first: {name}: {why})")


# ------------------------------------------------------------------ all four


def run_all(
    console: Console, wanted: Wanted, device: str, *, force: bool, options: dict[str, Any]
) -> None:
    """The four commands one after the other; with --json only the last one's object."""
    from .plan import announce

    measuring = {k: v for k, v in options.items() if k not in DRAWING}
    config = wanted.config(download)
    check(EvalOptions(**measuring).wishes, config)
    quiet = _Quiet() if console.as_json else console
    drawing = {name: options[name] for name in DRAWING}
    announce(console, config, wanted.folder, drawing, force=force)
    run = calibrate(quiet, wanted, device, force=force)
    where = str(run.path)
    quantize(quiet, (), where, device, force=force)
    sample(quiet, SampleOptions(**drawing, run_dir=where, device=device, force=force))
    evaluate(console, EvalOptions(**measuring, run_dir=where, device=device))


class _Quiet(Console):
    """A console whose results nobody reads."""

    def result(self, payload: dict[str, Any], render: Callable[[], None]) -> None:
        return None
