"""The second stage of a run: integer weights, ranges of activations, statistics of the noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.loading import load_config
from ..config.schema import Config
from ..errors import ArtifactError
from ..lineage import freshness
from ..lineage.freshness import State
from ..store.artifact_files import check_lineage, read_stored
from ..store.partial_folder import discard_unneeded, kept_phrase
from ..store.run_dir import RunDir, find_run, read_coverage
from .calibrate import keep_config
from .job import agreed
from .model import check_unbranched, model_digest, open_model
from .status import reported
from .watch import SILENT, Watch


@dataclass(frozen=True)
class Quantized:
    """artifact_bytes: of quantized.safetensors; coverage: coverage.json, bits and kernel of every
    layer; skipped, state: as of Calibrated; reuse, first_stage, text_encoders: what the plan of
    sampling.reuse, the decoder of first_stage.bits and the encoders of text_encoders.bits say, None
    without; the last with the bytes of their file."""

    run: RunDir
    artifact_bytes: int
    coverage: Mapping[str, Any]
    skipped: bool
    state: State | None
    reuse: Mapping[str, Any] | None = None
    first_stage: Mapping[str, Any] | None = None
    text_encoders: Mapping[str, Any] | None = None


def quantize(
    run_dir: str | Path | None = None,
    config: Config | None = None,
    *,
    device: str = "auto",
    force: bool = False,
    watch: Watch = SILENT,
) -> Quantized:
    """Round the weights to integers, set activation ranges, measure the quantization noise.

    run_dir: a calibrated run, None for the one that the command line calibrated last; it gets
    quantized.safetensors, noise_stats.safetensors and coverage.json, with sampling.reuse also the
    plan, reuse.safetensors, with first_stage.bits the decoder, first_stage.safetensors, with
    text_encoders.bits these, text_encoders.safetensors. config: instead of the run's config.yaml,
    which it replaces: the same calibration at other bits. device, force: as calibrate takes them.

    Raises ArtifactError where the calibration is missing, damaged, or of other settings than
    config's (the message says which); ModelError, BackendUnavailable.

    >>> quantize("runs/mine").coverage["mean_weight_bits"]
    """
    run = find_run(None if run_dir is None else str(run_dir))
    wanted = load_config(str(run.config)) if config is None else config
    check_unbranched(wanted)
    digest = model_digest(wanted)
    agreed(lambda: check_parents(run, wanted, digest))
    state = freshness.of_run(run, wanted, digest)[1] if digest is not None else None
    skipped = agreed(lambda: _holds(run, wanted, digest, state) and not force)
    if skipped:
        freshness.note_settings(run, "quantize", wanted)
        discard_unneeded(run.path, "quantize")
    else:
        skipped = _quantize(run, wanted, device, state, force, watch)
    if config is not None:
        agreed(lambda: keep_config(run, config))
    size = run.tensors("quantized").stat().st_size
    reuse = first_stage = encoders = None
    if wanted.sampling.reuse is not None:
        reuse = read_stored(run.tensors("reuse"), "reuse").body
    if wanted.first_stage.bits is not None:
        first_stage = read_stored(run.tensors("first_stage"), "first_stage").body
    if wanted.text_encoders.bits is not None:
        file = run.tensors("text_encoders")
        encoders = {**read_stored(file, "text_encoders").body, "bytes": file.stat().st_size}
    state = None if skipped else state
    coverage = read_coverage(run.coverage)
    return Quantized(run, size, coverage, skipped, state, reuse, first_stage, encoders)


def _holds(run: RunDir, config: Config, digest: str | None, state: State | None) -> bool:
    """Whether all outputs are there, among them the plan of sampling.reuse, the decoder of
    first_stage.bits and the encoders of text_encoders.bits where these are asked for.

    digest: of the model, where it is known; state: of the stage.
    """
    if digest is None or state is None or not state.holds:
        return False
    quantized = state.found["quantized"].digest
    decoder = config.first_stage.bits is None or freshness.first_stage(run, config, digest).holds
    if not decoder or not _has_encoders(run, config, digest):
        return False
    return config.sampling.reuse is None or freshness.reused(run, config, digest, quantized).holds


def _has_encoders(run: RunDir, config: Config, digest: str | None) -> bool:
    """Whether the text encoders that are asked for are there, if any are."""
    if config.text_encoders.bits is None:
        return True
    return digest is not None and freshness.text_encoders(run, config, digest).holds


def _quantize(
    run: RunDir, config: Config, device: str, state: State | None, force: bool, watch: Watch
) -> bool:
    """Whether the outputs were there already."""
    watch.reason(state, force)
    from ..models.loading import first_stage_of
    from ..runtime.ranks import of_job
    from ..stages import pipeline
    from ..store import artifacts

    ranks = of_job()
    kept = run.path, "quantize", "text_encoders"
    with watch.keeping(lambda: f"calibrate is kept, {kept_phrase(*kept)}"):
        digest = model_digest(config)
        needed = config.text_encoders.bits is not None and ranks.agreed(
            lambda: force or not _has_encoders(run, config, digest)
        )
        model = open_model(config, ranks.device(device), run.path, watch, keep_text=needed)
        if config.first_stage.bits is not None:
            first_stage_of(model)  # refused before hours of work
        if state is None:
            watch.reason(freshness.of_run(run, config, model.digest)[1], force)
        with ranks.locked(run.path, watch.note), reported(run.path, "quantize", watch) as watch:
            ranks.agreed(lambda: check_parents(run, config, model.digest))  # the lock is held
            encoded = not needed or pipeline.text_encoders(
                *(run, config, model, watch.track), force=force, tell=watch.note, ranks=ranks
            )
            model = replace(model, text=None)
            smoothing, calibration = (
                artifacts.read(run.tensors(kind), kind) for kind in ("smoothing", "calibration")
            )
            there = pipeline.quantize(
                *(run, config, model, calibration, smoothing, watch.track),
                force=force,
                tell=watch.note,
                ranks=ranks,
            )
            wanted = []
            if config.sampling.reuse is not None:
                wanted.append(pipeline.reuse)
            if config.first_stage.bits is not None:
                wanted.append(pipeline.first_stage)
            for make in wanted:
                there &= make(run, config, model, watch.track, force=force, ranks=ranks)
            return there and encoded


def check_parents(run: RunDir, config: Config, model: str | None) -> None:
    """What quantize reads is there and of this configuration and model. Raises ArtifactError."""
    smoothing, calibration = (
        read_stored(run.tensors(kind), kind) for kind in ("smoothing", "calibration")
    )
    calibrated = freshness.calibrated(run, config, model or smoothing.model)
    if calibrated.changed:
        hint = 'repeat "qncd calibrate" with these settings'
        raise ArtifactError(f"{run.path}: {calibrated.sentence()}", hint)
    digest = config.stage_digest("calibrate")
    check_lineage(smoothing, config=digest, model=model)
    parents = {"smoothing": smoothing.digest}
    check_lineage(calibration, config=digest, model=model, parents=parents)
