"""The first stage of a run: what quantization needs to know of the model in full precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config.loading import load_config
from ..config.schema import Config
from ..lineage import freshness
from ..lineage.freshness import State
from ..store.files import write_bytes
from ..store.partial_folder import discard_unneeded, kept_phrase
from ..store.run_dir import RunDir
from .job import agreed
from .model import check_unbranched, model_digest, note_sampling, open_model
from .status import reported
from .watch import SILENT, Watch


@dataclass(frozen=True)
class Calibrated:
    """rows: calibration inputs of the denoiser; layers: those that have statistics; skipped:
    whether all was there; state: why the stage ran again, None where it was skipped."""

    run: RunDir
    rows: int
    layers: int
    skipped: bool
    state: State | None


def calibrate(
    config: Config | str | Path,
    run_dir: str | Path,
    *,
    device: str = "auto",
    force: bool = False,
    watch: Watch = SILENT,
) -> Calibrated:
    """Collect calibration inputs, activation statistics and smoothing factors.

    config: a configuration, the file of one, or a shipped name such as "fashion_ldm_w4a8".
    run_dir: the folder of the run, made where it is missing: config.yaml, calibration.safetensors
    and smoothing.safetensors lie in it then. device: auto, cpu or cuda. force: again although
    nothing has changed.

    Raises ConfigError, ModelError, BackendUnavailable.

    >>> run = calibrate("fashion_ldm_w4a8", "runs/mine").run
    """
    if not isinstance(config, Config):
        config = load_config(str(config))
    check_unbranched(config)
    config.check_sizes()
    run = RunDir(Path(run_dir))
    digest = model_digest(config)
    state = freshness.calibrated(run, config, digest) if digest is not None else None
    skipped = agreed(lambda: state is not None and state.holds and not force)
    if state is not None and skipped:
        body = state.found["calibration"].body
        freshness.note_settings(run, "calibrate", config)
        discard_unneeded(run.path, "calibrate")
    else:
        watch.reason(state, force)
        from ..runtime.ranks import of_job
        from ..stages import pipeline

        ranks = of_job()
        with watch.keeping(lambda: kept_phrase(run.path, "calibrate")):
            model = open_model(config, ranks.device(device), run.path, watch)
            note_sampling(watch, config, model)
            if state is None:
                watch.reason(freshness.calibrated(run, config, model.digest), force)
            with (
                ranks.locked(run.path, watch.note),
                reported(run.path, "calibrate", watch) as watch,
            ):
                made, _, skipped = pipeline.calibrate(
                    *(run, config, model, watch.track), force=force, tell=watch.note, ranks=ranks
                )
        body = made.body
    agreed(lambda: keep_config(run, config))
    rows, layers = body["rows"], len(body["layers"])
    return Calibrated(run, rows, layers, skipped, None if skipped else state)


def keep_config(run: RunDir, config: Config) -> None:
    """config.yaml of a run; later stages read it."""
    text = config.to_yaml().encode()
    if not run.config.is_file() or run.config.read_bytes() != text:
        write_bytes(run.config, text)
