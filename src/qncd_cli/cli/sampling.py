"""The command sample: draw what is missing of a set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.loading import load_config, parse_config
from ..config.schema import Config
from ..errors import ConfigError
from ..lineage import sample_sets
from ..lineage.stages import State
from ..store.run_dir import RunDir, find_run, read_coverage
from . import states
from .console import Console, keeping
from .shared import done, note_sampling, open_model

DEFAULT_NUM = 64


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
    run = find_run(options.run_dir)
    own = load_config(str(run.config))
    config = sampling_config(_sampled_run(run, own, options.overrides), options)
    in_full = "full_compiled" if options.compiled else "full"  # eval compares with the plain one
    folder = run.samples(options.name or (in_full if options.full_precision else "quantized"))
    state = _set_state(run, own, config, folder, options)
    there = sample_sets.begun(folder) if state is not None and state.holds else None
    manifest = there or _draw(console, run, own, config, folder, options)
    count = options.num or DEFAULT_NUM
    if len(manifest["seeds"]) > count:
        console.note(
            f"{folder}: {len(manifest['seeds'])} images are there, {count} asked for: all are kept"
        )
    done(
        console,
        "sample",
        run,
        images=len(manifest["seeds"]),
        folder=str(folder),
        contact_sheet=str(sample_sets.sheet_path(folder)),
        skipped=there is not None,
    )
    return folder


def _set_state(
    run: RunDir, own: Config, config: Config, folder: Path, options: SampleOptions
) -> State | None:
    """What is there of the set, None where only drawing tells. Raises ArtifactError."""
    digest = states.model_digest(config)
    stored = None if options.full_precision else states.quantized_of(run, own, digest)
    if digest is None or options.force or config.sampling.guidance_scale < 1:
        return None
    digests = {"model": digest} | ({"quantized": stored.digest} if stored is not None else {})
    seed = config.sampling.seed
    return states.set_state(
        folder,
        config,
        digests,
        range(seed, seed + (options.num or DEFAULT_NUM)),
        options.batch_size,
        backend=None if options.backend == "auto" else options.backend,
        compiled=False if options.low_memory else options.compiled,
    )


def _draw(
    console: Console,
    run: RunDir,
    own: Config,
    config: Config,
    folder: Path,
    options: SampleOptions,
) -> dict[str, Any]:
    """Draw what is missing of the set; its manifest."""
    from ..backends.base import AUTO
    from ..runtime import auto_backend
    from ..runtime import sampled_model as subjects
    from ..runtime.compiled import FOLDER
    from ..stages import sample as stage
    from ..store import artifacts

    quantized = noise_stats = None
    if not options.full_precision:
        quantized = artifacts.read(run.tensors("quantized"), "quantized")
        noise_stats = artifacts.read(run.tensors("noise_stats"), "noise_stats")
    begun = None if options.force else sample_sets.begun(folder)
    model = open_model(config, options.device, run.path)
    little = options.low_memory
    backend = auto_backend.of_set(options.backend, begun, model.device, low_memory=little)
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
    batch_size = options.batch_size or sample_sets.default_batch(macs)
    request = stage.SampleRequest(folder, list(range(first, first + count)), batch_size)
    if options.force:
        stage.check(config, model, subject, request)
        sample_sets.clear(folder)
    how = subjects.Compiling(
        run.path / FOLDER,
        console.note,
        macs,
        False if little else options.compiled,
        bool(begun.get("compiled", False)) if begun else None,
    )
    subject = subjects.compiled(config, model, subject, request.seeds, how)
    if backend == AUTO:
        place = auto_backend.Place(how.folder, subject.digests, little, graphs=not little)
        drawn = request.seeds, request.batch_size
        subject = auto_backend.chosen(config, model, subject, *drawn, how, place)
    _note_backend(console, subject)
    with keeping("images of finished batches are kept, the same command goes on with the next"):
        return stage.run(config, model, subject, request, console.track)


def _macs(run: RunDir, config: Config, model: Any, kind: str) -> int:
    """MACs of one denoiser call on one sample."""
    from ..runtime.denoiser import denoiser_costs

    if kind == "quantized" or run.coverage.is_file():
        return int(read_coverage(run.coverage)["macs"])
    return sum(cost.macs for cost in denoiser_costs(config, model))


def _note_backend(console: Console, subject: Any) -> None:
    if subject.backend is None:
        return
    console.note(f"backend {subject.backend.name}: {subject.backend.remark}")
    fallbacks = subject.fallbacks()
    for name, why in list(fallbacks.items())[:1]:
        console.note(f"{len(fallbacks)} layers are simulated in float32 (first: {name}: {why})")
