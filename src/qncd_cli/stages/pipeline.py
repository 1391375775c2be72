"""Stages one after the other: each is skipped where its outputs are there and still hold.

Every function takes the folder that its stage writes to, so that runs and tables of many
configurations (the ablate stage) share the work that they have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import machine
from ..config.schema import Config, Stage
from ..lineage import freshness
from ..models.evidence import explained
from ..models.loading import DiffusionModel
from ..progress import Track, no_progress
from ..ptq.first_stage import quantize_first_stage
from ..ptq.noise import measure_noise
from ..ptq.reuse import find_reuse
from ..runtime.ranks import ALONE, Message, Ranks
from ..runtime.sampled_model import SampledModel
from ..store import artifacts
from ..store.artifacts import Artifact
from ..store.files import write_sealed_json
from ..store.partial import Partial
from ..store.partial_folder import code_digest, discard_stage, folder_of
from ..store.run_dir import RunDir
from ..store.unfinished import remove_unfinished
from . import calibrate as calibrate_stage
from . import quantize as quantize_stage
from . import sample as sample_stage
from . import text_encoders as text_encoders_stage

Tell = Callable[[str], None]


def unheard(line: str) -> None:
    """The Tell of callers that want to hear nothing."""


def calibrate(
    run: RunDir,
    config: Config,
    model: DiffusionModel,
    track: Track = no_progress,
    *,
    force: bool = False,
    tell: Tell = unheard,
    ranks: Ranks = ALONE,
) -> tuple[Artifact, Artifact, bool]:
    """calibration, smoothing, and whether both were there already.

    A stage that was interrupted goes on from there, forced or not: the same comes out. tell:
    receives a line where it has to begin again. ranks: share the trajectories, each keeps its own.
    """
    kinds = ("calibration", "smoothing")
    if ranks.agreed(lambda: not force and freshness.calibrated(run, config, model.digest).holds):
        calibration, smoothing = (artifacts.read(run.tensors(kind), kind) for kind in kinds)
        freshness.note_settings(run, "calibrate", config)
        discard_stage(run.path, "calibrate")
        return calibration, smoothing, True
    with kept("calibrate", run, config, model, {}, tell, ranks) as partial:
        with explained(model):
            made = calibrate_stage.run(config, model, track, partial, ranks)

        def write() -> None:
            assert made is not None
            for kind, artifact in reversed([*zip(kinds, made, strict=True)]):
                artifacts.write(run.tensors(kind), artifact)
            freshness.note_settings(run, "calibrate", config)

        ranks.agreed(write)
    calibration, smoothing = (artifacts.read(run.tensors(kind), kind) for kind in kinds)
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
    tell: Tell = unheard,
    ranks: Ranks = ALONE,
    also: Collection[str] = (),
) -> bool:
    """Write quantized, noise_stats and coverage; whether they were there already. As calibrate.

    also: statistics of noise beside those that the configuration needs. Where these alone are
    missing, the noise alone is measured again.
    """
    parents = {"calibration": calibration.digest, "smoothing": smoothing.digest}
    of_stage = run, config, model.digest, parents
    if ranks.agreed(lambda: not force and freshness.quantized_from(*of_stage, also).holds):
        freshness.note_settings(run, "quantize", config)
        discard_stage(run.path, "quantize")
        return True
    if ranks.agreed(lambda: not force and freshness.weights_from(*of_stage).holds):
        ranks.agreed(lambda: _measure_noise(run, config, model, calibration, track, tell, also))
        return False
    with kept("quantize", run, config, model, parents, tell, ranks) as partial:
        with explained(model):
            result = quantize_stage.run(
                *(config, model, calibration, smoothing, track, partial), ranks=ranks, also=also
            )

        def write() -> None:
            assert result is not None
            artifacts.write(run.tensors("quantized"), result.quantized)
            write_sealed_json(run.coverage, result.coverage)
            # last, because it names the quantized: while it does not, the stage is not done
            artifacts.write(run.tensors("noise_stats"), result.noise_stats)
            freshness.note_settings(run, "quantize", config)

        ranks.agreed(write)
    return False


def _measure_noise(
    run: RunDir,
    config: Config,
    model: DiffusionModel,
    calibration: Artifact,
    track: Track,
    tell: Tell,
    also: Collection[str],
) -> None:
    """Write noise_stats of the quantized model that is there, with what they already hold."""
    quantized = artifacts.read(run.tensors("quantized"), "quantized")
    parents = {"quantized": quantized.digest}
    found = freshness.quantized_from(run, config, model.digest, dict(quantized.parents)).found
    there = found.get("noise_stats")
    if there is not None and there.parents == parents:
        also = {*also, *there.body.get("measured", ())}
    with kept("quantize", run, config, model, parents, tell, ALONE) as partial, explained(model):
        statistics = measure_noise(config, model, quantized, track, partial, also, calibration)
        artifacts.write(run.tensors("noise_stats"), statistics)
        freshness.note_settings(run, "quantize", config)


def reuse(
    run: RunDir,
    config: Config,
    model: DiffusionModel,
    track: Track = no_progress,
    *,
    force: bool = False,
    ranks: Ranks = ALONE,
) -> bool:
    """Write the plan of `sampling.reuse`; whether it was there already.

    It belongs to one quantized model, and is made beside it by the first of the ranks alone: other
    shares of MACs need no other weights.
    """

    def make() -> bool:
        quantized = artifacts.read(run.tensors("quantized"), "quantized")
        if not force and freshness.reused(run, config, model.digest, quantized.digest).holds:
            return True
        calibration = artifacts.read(run.tensors("calibration"), "calibration")
        with explained(model):
            made = find_reuse(config, model, calibration, quantized, track)
        artifacts.write(run.tensors("reuse"), made)
        freshness.note_settings(run, "reuse", config)
        return False

    return ranks.agreed(make)


def first_stage(
    run: RunDir,
    config: Config,
    model: DiffusionModel,
    track: Track = no_progress,
    *,
    force: bool = False,
    ranks: Ranks = ALONE,
) -> bool:
    """Write the decoder of `first_stage.bits`; whether it was there already. As `reuse`: the first
    of the ranks alone makes it, and one serves a model at all bits of its denoiser."""

    def make() -> bool:
        if not force and freshness.first_stage(run, config, model.digest).holds:
            return True
        with explained(model):
            made = quantize_first_stage(config, model, track)
        artifacts.write(run.tensors("first_stage"), made)
        freshness.note_settings(run, "first_stage", config)
        return False

    return ranks.agreed(make)


def text_encoders(
    run: RunDir,
    config: Config,
    model: DiffusionModel,
    track: Track = no_progress,
    *,
    force: bool = False,
    tell: Tell = unheard,
    ranks: Ranks = ALONE,
) -> bool:
    """Write the text encoders of `text_encoders.bits`; whether they were there already. As
    `first_stage`; a call that was interrupted goes on. model: with its own text encoders, which are
    spent."""
    stage: Stage = "text_encoders"

    def make() -> bool:
        if not force and freshness.text_encoders(run, config, model.digest).holds:
            discard_stage(run.path, stage)
            return True
        with kept(stage, run, config, model, {}, tell, ALONE) as partial:
            with explained(model):
                made = text_encoders_stage.run(config, model, track, partial)
            artifacts.write(run.tensors(stage), made)
            freshness.note_settings(run, stage, config)
        return False

    return ranks.agreed(make)


@contextmanager
def kept(
    stage: Stage,
    run: RunDir,
    config: Config,
    model: DiffusionModel,
    parents: dict[str, str],
    tell: Tell,
    ranks: Ranks,
) -> Iterator[Partial]:
    """Partial results of a stage, of a job each rank its own; gone once the block ends well."""
    ranks.agreed(lambda: remove_unfinished(run.path))
    made_from, folder = _made_from(stage, config, model, parents), folder_of(run.path, stage)
    if ranks.count > 1:
        made_from["rank"] = f"{ranks.rank} of {ranks.count}"
        folder = folder.with_name(f"{stage}.{ranks.rank}-of-{ranks.count}")
    with Partial(folder, made_from, tell) as partial:
        yield partial
        partial.remove()
    ranks.gathered(Message())  # nobody needs theirs any more
    ranks.agreed(lambda: discard_stage(run.path, stage))


def _made_from(
    stage: Stage, config: Config, model: DiffusionModel, parents: dict[str, str]
) -> dict[str, Any]:
    """Everything that decides a stage's pieces, to the bit: with other vectors or threads, sums
    are added in another order."""
    here = machine.described()
    return {
        "configuration": config.stage_inputs(stage),
        "model": model.digest,
        "parents": parents,
        "code": code_digest(),
        "torch": here["torch"],
        "diffusers": version("diffusers"),
        "device": str(model.device),
        "threads": here["threads"],
        "vectors": here["capability"],
    }


def full_precision_samples(
    runs: Path,
    config: Config,
    model: DiffusionModel,
    seeds: list[int],
    batch_size: int,
    track: Track = no_progress,
    *,
    tell: Tell = unheard,
    ranks: Ranks = ALONE,
) -> Path:
    """The folder of full-precision samples of these seeds; what is missing is drawn.

    They belong to the model and the sampler, not to one run, so that runs beside each other
    share them: <runs>/full-precision/<digest>. tell: hears of another process that draws there;
    ranks: draw together.
    """
    sampled = SampledModel.full_precision(model)
    folder = runs / "full-precision" / sample_stage.identify(config, model, sampled)["digest"]
    request = sample_stage.SampleRequest(folder, seeds, batch_size)
    with ranks.locked(folder, tell):
        sample_stage.run(config, model, sampled, request, track, ranks)
    return folder
