"""Stages one after the other: each is skipped where its outputs are there and still hold.

Every function takes the folder that its stage writes to, so that runs and tables of many
configurations (the ablate stage) share the work that they have in common.
"""

from __future__ import annotations

from pathlib import Path

from ..config.schema import Config
from ..lineage import freshness
from ..models.evidence import explained
from ..models.loading import DiffusionModel
from ..progress import Track, no_progress
from ..runtime.sampled_model import SampledModel
from ..store import artifacts
from ..store.artifacts import Artifact
from ..store.files import remove_temporaries, write_json
from ..store.run_dir import RunDir
from . import calibrate as calibrate_stage
from . import quantize as quantize_stage
from . import sample as sample_stage


def calibrate(
    run: RunDir,
    config: Config,
    model: DiffusionModel,
    track: Track = no_progress,
    *,
    force: bool = False,
) -> tuple[Artifact, Artifact, bool]:
    """calibration, smoothing, and whether both were there already."""
    if not force and freshness.calibrated(run, config, model.digest).holds:
        kinds = ("calibration", "smoothing")
        calibration, smoothing = (artifacts.read(run.tensors(kind), kind) for kind in kinds)
        freshness.note_settings(run, "calibrate", config)
        return calibration, smoothing, True
    remove_temporaries(run.path)
    with explained(model):
        calibration, smoothing = calibrate_stage.run(config, model, track)
    smoothing = artifacts.write(run.tensors("smoothing"), smoothing)
    calibration = artifacts.write(run.tensors("calibration"), calibration)
    freshness.note_settings(run, "calibrate", config)
    return calibration, smoothing, False


def quantize(
    run: RunDir,
    config: Config,
    model: DiffusionModel,
    calibration: Artifact,
    smoothing: Artifact,
    track: Track = no_progress,
    *,
    force: bool = False,
) -> bool:
    """Write quantized, noise_stats and coverage; whether they were there already."""
    parents = {"calibration": calibration.digest, "smoothing": smoothing.digest}
    if not force and freshness.quantized_from(run, config, model.digest, parents).holds:
        freshness.note_settings(run, "quantize", config)
        return True
    remove_temporaries(run.path)
    with explained(model):
        result = quantize_stage.run(config, model, calibration, smoothing, track)
    artifacts.write(run.tensors("quantized"), result.quantized)
    artifacts.write(run.tensors("noise_stats"), result.noise_stats)
    write_json(run.coverage, result.coverage)
    freshness.note_settings(run, "quantize", config)
    return False


def full_precision_samples(
    runs: Path,
    config: Config,
    model: DiffusionModel,
    seeds: list[int],
    batch_size: int,
    track: Track = no_progress,
) -> Path:
    """The folder of full-precision samples of these seeds; what is missing is drawn.

    They belong to the model and the sampler, not to one run, so that runs beside each other
    share them: <runs>/full-precision/<digest>.
    """
    sampled = SampledModel.full_precision(model)
    folder = runs / "full-precision" / sample_stage.identify(config, model, sampled)["digest"]
    request = sample_stage.SampleRequest(folder, seeds, batch_size)
    sample_stage.run(config, model, sampled, request, track)
    return folder
