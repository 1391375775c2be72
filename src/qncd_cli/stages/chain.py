"""Stages one after the other: each is skipped where its outputs are there and still hold.

Every function takes the folder that its stage writes to, so that runs and tables of many
configurations (the ablate stage) share the work that they have in common.
"""

from __future__ import annotations

from pathlib import Path

from .. import artifacts
from ..artifacts import Artifact
from ..config import Config
from ..errors import ArtifactError
from ..files import remove_temporaries, write_json
from ..models.loading import DiffusionModel
from ..progress import Track, no_progress
from ..run_dir import RunDir
from . import calibrate as calibrate_stage
from . import quantize as quantize_stage
from . import sample as sample_stage
from .evidence import explained
from .subject import full_precision


def up_to_date(path: Path, kind: str, config: str, model: str) -> Artifact | None:
    """The artifact if it is sound and was made from just these inputs."""
    try:
        artifact = artifacts.read(path, kind)
        artifacts.check_lineage(artifact, config=config, model=model)
    except ArtifactError:
        return None
    return artifact


def calibrate(
    run: RunDir,
    config: Config,
    model: DiffusionModel,
    track: Track = no_progress,
    *,
    force: bool = False,
) -> tuple[Artifact, Artifact, bool]:
    """calibration, smoothing, and whether both were there already."""
    digest = config.stage_digest("calibrate")
    if not force:
        smoothing = up_to_date(run.tensors("smoothing"), "smoothing", digest, model.digest)
        calibration = up_to_date(run.tensors("calibration"), "calibration", digest, model.digest)
        if smoothing and calibration:
            return calibration, smoothing, True
    remove_temporaries(run.path)
    with explained(model):
        calibration, smoothing = calibrate_stage.run(config, model, track)
    smoothing = artifacts.write(run.tensors("smoothing"), smoothing)
    return artifacts.write(run.tensors("calibration"), calibration), smoothing, False


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
    if not force and _quantized(run, config, model.digest, parents):
        return True
    remove_temporaries(run.path)
    with explained(model):
        result = quantize_stage.run(config, model, calibration, smoothing, track)
    artifacts.write(run.tensors("quantized"), result.quantized)
    artifacts.write(run.tensors("noise_stats"), result.noise_stats)
    write_json(run.coverage, result.coverage)
    return False


def _quantized(run: RunDir, config: Config, model: str, parents: dict[str, str]) -> bool:
    """Whether the stage's outputs are there and sound."""
    digest = config.stage_digest("quantize")
    quantized = up_to_date(run.tensors("quantized"), "quantized", digest, model)
    noise = up_to_date(run.tensors("noise_stats"), "noise_stats", digest, model)
    if quantized is None or noise is None or not run.coverage.is_file():
        return False
    return quantized.parents == parents and noise.parents == {"quantized": quantized.digest}


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
    subject = full_precision(model)
    folder = runs / "full-precision" / sample_stage.identify(config, model, subject)["digest"]
    request = sample_stage.SampleRequest(folder, seeds, batch_size)
    sample_stage.run(config, model, subject, request, track)
    return folder
