"""Drawing what is missing of a run's sample set, by one process, several, or shard by shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.schema import Config
from ..errors import ArtifactError
from ..lineage import sample_sets
from ..lineage.shards import Shard, shard_folders
from ..spec import Compile
from ..store.lock import locked
from ..store.run_dir import RunDir, read_coverage
from .model import note_sampling, note_size, open_model
from .sets import KEPT
from .status import reported
from .watch import Watch

if TYPE_CHECKING:
    from ..models.loading import DiffusionModel
    from ..runtime.sampled_model import SampledModel
    from ..stages.sample import Drawn


@dataclass(frozen=True)
class DrawingWishes:
    """What a set is drawn with, beside its configuration. shard: its number and how many."""

    num: int
    batch_size: int | None
    full_precision: bool
    backend: str
    compile: Compile
    low_memory: bool
    device: str
    force: bool
    shard: tuple[int, int] | None = None

    @property
    def set_name(self) -> str:
        if not self.full_precision:
            return "quantized"
        # eval compares with the plain one
        return "full_compiled" if self.compile is Compile.YES else "full"


def draw(
    run: RunDir, own: Config, config: Config, of_set: Path, wishes: DrawingWishes, watch: Watch
) -> Drawn:
    """Draw what is missing of the set, or of the shard of it that is wished for.

    A whole set is drawn under the run's lock, by all processes of a job together. Shards are drawn
    at once: under that lock each looks how the others are drawn and compiles what is not there
    yet, under its own it draws.
    """
    from ..lineage.growing_set import note_begun
    from ..models.loading import find_device
    from ..runtime.compiled_graph import GRAPHS_FOLDER
    from ..runtime.preparation import Preparation, prepare
    from ..runtime.ranks import of_job
    from ..runtime.text_encoders import encoders_backend, other_encoders
    from ..stages import sample as stage
    from ..store import artifacts

    ranks = of_job()
    whole = range(config.sampling.seed, config.sampling.seed + wishes.num)
    shard = None if wishes.shard is None else Shard(*wishes.shard, whole)
    folder = of_set if shard is None else shard.folder(of_set)
    with ranks.locked(run.path, watch.note):
        ranks.agreed(lambda: None)  # the lock is held
        quantized = reuse = decoder = text = None
        if not wishes.full_precision:
            kinds = "quantized", "noise_stats"
            artifact, noise_stats = (artifacts.read(run.tensors(kind), kind) for kind in kinds)
            quantized = artifact, noise_stats
            if config.sampling.reuse is not None:
                reuse = artifacts.read(run.tensors("reuse"), "reuse")
            if config.first_stage.bits is not None:
                decoder = artifacts.read(run.tensors("first_stage"), "first_stage")
            if config.text_encoders.bits is not None:
                text = artifacts.read(run.tensors("text_encoders"), "text_encoders")
        begun = None if wishes.force else _begun(folder, of_set, shard)
        place = ranks.device(wishes.device)
        encoding = None
        if text is not None:
            before = (begun or {}).get("encoded_by")
            encoding = text, encoders_backend(wishes.backend, find_device(place), before)
        others = (
            None
            if encoding is None
            else other_encoders(encoding[0], config.model.source, encoding[1])
        )
        model = open_model(config, place, run.path, watch, encoders=others)
        if config.sampling != own.sampling:
            note_sampling(watch, config, model)
            note_size(watch, config, model, quantized)
        stage.check(config, model, quantized[1] if quantized else None, list(whole), reuse)
        macs = _macs(run, config, model, full_precision=wishes.full_precision)
        batch_size = wishes.batch_size or sample_sets.default_batch(macs)
        how = Preparation(
            whole,
            batch_size,
            macs,
            run.path / GRAPHS_FOLDER,
            watch.note,
            wishes.backend,
            wishes.compile,
            low_memory=wishes.low_memory,
            in_place=True,
            begun=begun,
        )
        sampled = ranks.after_first(
            lambda: prepare(config, model, quantized, how, reuse, decoder),
            lambda decided: prepare(
                *(config, model, quantized, replace(how, begun=decided), reuse, decoder)
            ),
            lambda made: {
                "backend": made.backend.name if made.backend else None,
                "compiled": made.compiled,
            },
        )
        if encoding is not None:
            sampled = sampled.encoding(*encoding)
        _note_backend(watch, sampled)
        seeds = whole if shard is None else shard.seeds(batch_size)
        request = stage.SampleRequest(folder, list(seeds), batch_size, shard)
        if wishes.force:
            ranks.agreed(lambda: sample_sets.clear(folder))
        if shard is None:
            with watch.keeping(KEPT), reported(run.path, "sample", watch) as heard:
                return stage.run(config, model, sampled, request, heard.track, ranks)
        if not seeds:
            watch.note(f"shard {shard.label}: no batch is left for it")
            return stage.Drawn({"seeds": []})
        identity = stage.identify(config, model, sampled, request)
        note_begun(folder, identity, request.noted, seeds)
    with (
        watch.keeping(KEPT),
        locked(folder, watch.note),
        reported(folder, "sample", watch) as heard,
    ):
        return stage.run(config, model, sampled, request, heard.track)


def in_format(folder: Path, format: str, watch: Watch) -> Path:
    """Write a complete set in a format, where it is not there yet; its place."""
    if format == "png":
        return folder
    from ..lineage.sample_set import read_set
    from ..lineage.set_formats import write_format

    return write_format(read_set(folder), format, watch.track)


def _begun(folder: Path, of_set: Path, shard: Shard | None) -> Mapping[str, Any] | None:
    """The manifest of the set; for a shard also that of another one, or of what they are for."""
    found = sample_sets.begun(folder)
    if found is not None or shard is None:
        return found
    for other in (of_set, *shard_folders(of_set)):
        try:
            found = sample_sets.begun(other)
        except ArtifactError:
            continue
        if found is not None:
            return found
    return None


def _macs(run: RunDir, config: Config, model: DiffusionModel, *, full_precision: bool) -> int:
    """MACs of one denoiser call on one sample."""
    from ..runtime.denoiser import denoiser_costs

    if not full_precision or run.coverage.is_file():
        return int(read_coverage(run.coverage)["macs"])
    return sum(cost.macs for cost in denoiser_costs(config, model))


def _note_backend(watch: Watch, sampled: SampledModel) -> None:
    if sampled.backend is None:
        return
    watch.note(f"backend {sampled.backend.name}: {sampled.backend.remark}")
    fallbacks = sampled.fallbacks()
    for name, why in list(fallbacks.items())[:1]:
        watch.note(f"{len(fallbacks)} layers are simulated in float32 (first: {name}: {why})")
