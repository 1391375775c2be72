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
from ..spec import Compile
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
    compile: Compile = Compile.WHERE_IT_PAYS
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
    folder = run.samples(options.name or _set_name(options))
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


def _set_name(options: SampleOptions) -> str:
    if not options.full_precision:
        return "quantized"
    # eval compares with the plain one
    return "full_compiled" if options.compile is Compile.YES else "full"


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
        compile=Compile.NO if options.low_memory else options.compile,
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
    from ..runtime.compiled_graph import GRAPHS_FOLDER
    from ..runtime.preparation import Preparation, prepare
    from ..stages import sample as stage
    from ..store import artifacts

    quantized = None
    if not options.full_precision:
        kinds = "quantized", "noise_stats"
        artifact, noise_stats = (artifacts.read(run.tensors(kind), kind) for kind in kinds)
        quantized = artifact, noise_stats
    begun = None if options.force else sample_sets.begun(folder)
    model = open_model(config, options.device, run.path)
    if config.sampling != own.sampling:
        note_sampling(console, config, model)
    first, count = config.sampling.seed, options.num or DEFAULT_NUM
    seeds = list(range(first, first + count))
    stage.check(config, model, quantized[1] if quantized else None, seeds)
    macs = _macs(run, config, model, full_precision=options.full_precision)
    batch_size = options.batch_size or sample_sets.default_batch(macs)
    how = Preparation(
        seeds,
        batch_size,
        macs,
        run.path / GRAPHS_FOLDER,
        console.note,
        options.backend,
        options.compile,
        low_memory=options.low_memory,
        in_place=True,
        begun=begun,
    )
    sampled = prepare(config, model, quantized, how)
    _note_backend(console, sampled)
    if options.force:
        sample_sets.clear(folder)
    request = stage.SampleRequest(folder, seeds, batch_size)
    with keeping("images of finished batches are kept, the same command goes on with the next"):
        return stage.run(config, model, sampled, request, console.track)


def _macs(run: RunDir, config: Config, model: Any, *, full_precision: bool) -> int:
    """MACs of one denoiser call on one sample."""
    from ..runtime.denoiser import denoiser_costs

    if not full_precision or run.coverage.is_file():
        return int(read_coverage(run.coverage)["macs"])
    return sum(cost.macs for cost in denoiser_costs(config, model))


def _note_backend(console: Console, sampled: Any) -> None:
    if sampled.backend is None:
        return
    console.note(f"backend {sampled.backend.name}: {sampled.backend.remark}")
    fallbacks = sampled.fallbacks()
    for name, why in list(fallbacks.items())[:1]:
        console.note(f"{len(fallbacks)} layers are simulated in float32 (first: {name}: {why})")
