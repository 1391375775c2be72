"""What the commands do: load, call a stage, write its artifacts, render the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..config.loading import load_config
from ..config.schema import Config
from ..lineage import stages as fresh
from ..lineage.stages import State
from ..store.files import write_bytes
from ..store.run_dir import RunDir, find_run, read_coverage, set_current
from . import states
from .console import Console, keeping
from .evaluation import EvalOptions, evaluate
from .measuring import check
from .sampling import SampleOptions, sample
from .shared import done, download, note_sampling, open_model
from .wanted import Wanted

DRAWING = ("steps", "num", "seed", "classes", "prompts", "batch_size", "backend")
"""Options of `run` that say what to sample."""


# ------------------------------------------------------------------ calibrate


def calibrate(
    console: Console, wanted: Wanted, device: str, *, force: bool, dry_run: bool = False
) -> RunDir:
    config = wanted.config(None if dry_run else download)
    run = RunDir(wanted.folder)
    if dry_run:
        console.result({"config": config.to_dict()}, lambda: print(config.to_yaml(), end=""))
        return run
    digest = states.model_digest(config)
    state = fresh.calibrated(run, config, digest) if digest is not None else None
    if state is not None and state.holds and not force:
        body, skipped = state.found["calibration"].body, True
        fresh.note_settings(run, "calibrate", config)
    else:
        body, skipped = _calibrate(console, run, config, device, state, force=force)
    _keep_config(run, config)
    set_current(run)
    done(
        console,
        "calibrate",
        run,
        rows=body["rows"],
        layers=len(body["layers"]),
        skipped=skipped,
        **states.described(None if skipped else state, force=force),
    )
    return run


def _calibrate(
    console: Console, run: RunDir, config: Config, device: str, state: State | None, *, force: bool
) -> tuple[dict[str, Any], bool]:
    """The artifact's body, and whether it was there already."""
    states.say(console, state, force=force)
    from ..stages import pipeline

    with keeping("nothing of calibrate is kept, the same command begins it again"):
        model = open_model(config, device, run.path)
        note_sampling(console, config, model)
        if state is None:
            states.say(console, fresh.calibrated(run, config, model.digest), force=force)
        calibration, _, skipped = pipeline.calibrate(run, config, model, console.track, force=force)
    return calibration.body, skipped


def _keep_config(run: RunDir, config: Config) -> None:
    text = config.to_yaml().encode()
    if not run.config.is_file() or run.config.read_bytes() != text:
        write_bytes(run.config, text)


# ------------------------------------------------------------------ quantize


def quantize(
    console: Console, overrides: Sequence[str], run_dir: str | None, device: str, *, force: bool
) -> None:
    run = find_run(run_dir)
    config = load_config(str(run.config), overrides)
    digest = states.model_digest(config)
    states.check_parents(run, config, digest)
    state = fresh.of_run(run, config, digest)[1] if digest is not None else None
    skipped = state is not None and state.holds and not force
    if skipped:
        fresh.note_settings(run, "quantize", config)
    else:
        skipped = _quantize(console, run, config, device, state, force=force)
    if overrides:
        _keep_config(run, config)
    coverage = read_coverage(run.coverage)
    artifact_bytes = run.tensors("quantized").stat().st_size
    size = artifact_bytes + coverage["rest_bytes"]
    done(
        console,
        "quantize",
        run,
        bytes=size,
        artifact_bytes=artifact_bytes,
        share_of_float32=size / coverage["float_denoiser_bytes"],
        integer_macs_share=coverage["integer_macs_share"],
        average_weight_bits=coverage["average_weight_bits"],
        mean_weight_bits=coverage["mean_weight_bits"],
        mean_input_bits=coverage["mean_input_bits"],
        skipped=skipped,
        **states.described(None if skipped else state, force=force),
    )


def _quantize(
    console: Console, run: RunDir, config: Config, device: str, state: State | None, *, force: bool
) -> bool:
    """Whether the outputs were there already."""
    states.say(console, state, force=force)
    from ..stages import pipeline
    from ..store import artifacts

    with keeping("calibrate is kept, nothing of quantize is; the same command begins it again"):
        model = open_model(config, device, run.path)
        states.check_parents(run, config, model.digest)
        if state is None:
            states.say(console, fresh.of_run(run, config, model.digest)[1], force=force)
        smoothing = artifacts.read(run.tensors("smoothing"), "smoothing")
        calibration = artifacts.read(run.tensors("calibration"), "calibration")
        return pipeline.quantize(
            run, config, model, calibration, smoothing, console.track, force=force
        )


# ------------------------------------------------------------------ all four


def run_all(
    console: Console, wanted: Wanted, device: str, *, force: bool, options: dict[str, Any]
) -> None:
    """The four commands one after the other; with --json only the last one's object.

    What is unchanged and what is done again, and why, is said before anything is written.
    """
    from .plan import announce

    config, planned = wanted.config(download), RunDir(wanted.folder)
    measuring = {k: v for k, v in options.items() if k not in DRAWING}
    check(EvalOptions(**measuring).wishes, config)
    digest = states.model_digest(config)
    plan = {}
    if digest is not None:
        sampled = planned.samples(options["name"])
        plan = states.plan(console, planned, config, digest, sampled, force=force)
    drawing = {name: options[name] for name in DRAWING}
    announce(console, config, planned.path, drawing, force=force)
    stages = _OneAfterTheOther(console.as_json)
    run = calibrate(stages, wanted, device, force=force)
    where = str(run.path)
    quantize(stages, (), where, device, force=force)
    name = options["name"]
    sample(stages, SampleOptions(**drawing, name=name, run_dir=where, device=device, force=force))
    stages.more = {"stages": plan}
    evaluate(stages, EvalOptions(**measuring, run_dir=where, device=device))


class _OneAfterTheOther(Console):
    """A console of stages that were announced: people read all results, programs the last one's.

    more: what belongs to that beside the last stage's own; None before it.
    """

    announced = True
    more: dict[str, Any] | None = None

    def result(self, payload: dict[str, Any], render: Callable[[], None]) -> None:
        if not self.as_json or self.more is not None:
            super().result({**payload, **(self.more or {})}, render)
