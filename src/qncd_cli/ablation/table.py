"""The table of `qncd ablate`: variants of one configuration, measured on the same seeds.

Nothing is trained. Rows share what they have in common: the full-precision samples, the
calibration where its digest agrees, and the quantized weights where theirs does. In the folder:

| path | what |
|---|---|
| calibration/DIGEST/ | calibration and smoothing of the rows with this digest |
| quantized/DIGEST/ | quantized weights, noise statistics, coverage, likewise |
| samples/ROW/ | the row's images |
| rows/ROW.json | the finished row; it holds until anything that decides it changes |
| ablation.json | all rows asked for, rewritten after each |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..backends.base import AUTO, get_backend
from ..config.schema import Config
from ..errors import ArtifactError
from ..lineage import sample_sets
from ..lineage.sample_set import match_sets, read_set
from ..metrics.protocol import Protocol, describe, prepared
from ..models.loading import DiffusionModel
from ..progress import Track, no_progress
from ..runtime.auto_backend import BackendCache, backend_of_table
from ..runtime.compiled_graph import GRAPHS_FOLDER
from ..runtime.denoiser import denoiser_costs
from ..runtime.preparation import Preparation, prepare
from ..sampling.noise import ranges
from ..stages import evaluate, pipeline, sample
from ..stages.evaluate import Measured
from ..store import artifacts
from ..store.digests import digest_of
from ..store.files import read_json, write_sealed_json
from ..store.run_dir import RunDir, read_coverage
from . import rendering
from .gains import with_gains
from .variants import Variant, check_variants, statistics_of

Tell = Callable[[str], None]


@dataclass(frozen=True)
class AblateRequest:
    """folder: of the table; count: samples a row, from config.sampling.seed on; batch_size: None
    for what suits the model."""

    folder: Path
    count: int
    batch_size: int | None
    force: bool = False
    backend: str = "auto"

    @property
    def table(self) -> Path:
        return self.folder / "ablation.json"

    def row(self, variant: Variant) -> Path:
        return self.folder / "rows" / f"{variant.label}.json"

    def samples(self, variant: Variant) -> Path:
        return self.folder / "samples" / variant.label

    def seeds(self, config: Config) -> list[int]:
        """Seeds that the samples of every row share."""
        return list(range(config.sampling.seed, config.sampling.seed + self.count))

    def batch(self, macs: int) -> int:
        """Samples drawn together. macs: of one call on one sample."""
        return self.batch_size or sample_sets.default_batch(macs)


@dataclass
class _Ablation:
    """What the rows of one call share.

    backend: the one of all rows, auto until a row has been drawn or found; statistics: of noise,
    that corrections of any row need; redone: folders that --force has already renewed.
    """

    request: AblateRequest
    model: DiffusionModel
    protocol: Protocol
    tell: Tell
    track: Track
    backend: str
    statistics: frozenset[str]
    full: Measured | None = None
    redone: set[Path] = field(default_factory=set)

    def force(self, folder: Path) -> bool:
        first = self.request.force and folder not in self.redone
        self.redone.add(folder)
        return first


def run(
    variants: Sequence[Variant],
    model: DiffusionModel,
    request: AblateRequest,
    protocol: Protocol,
    tell: Tell,
    track: Track = no_progress,
) -> dict[str, Any]:
    """The content of ablation.json. tell: receives a line before and after every row.

    Raises what the stages raise; finished rows are kept and the next call goes on from there.
    """
    check_variants(variants)
    protocol = prepared(protocol, request.count, track)
    for variant in variants:
        model.labels([variant.config.sampling.seed], variant.config.sampling.classes)
    statistics = statistics_of(variants)
    ablation = _Ablation(request, model, protocol, tell, track, request.backend, statistics)
    if ablation.backend == AUTO:
        ablation.backend = backend_of_table(_cache(ablation), model.device)
    table = _table(variants[0].config, ablation)
    rows: list[dict[str, Any]] = []
    for number, variant in enumerate(variants, start=1):
        identity = identify(variant.config, ablation)
        row = None if request.force else _finished(request.row(variant), identity)
        tell(
            f"row {number} of {len(variants)}: {variant.name} at {variant.widths}"
            + (": unchanged" if row else "")
        )
        if row is None:
            row = _measure(variant, identity, ablation)
            write_sealed_json(request.row(variant), row)
            tell(f"  done in {row['row']['seconds']:.1f} s")
        ablation.backend = get_backend(ablation.backend, model.device).name
        rows.append(row["row"])
        table |= {"full": row["full"], "rows": with_gains(rows)}
        write_sealed_json(request.table, table)
    return table


def identify(config: Config, ablation: _Ablation) -> dict[str, Any]:
    """Everything that decides a row, as digests and values."""
    network, reference = ablation.protocol.network, ablation.protocol.reference
    inter = config.correction.inter.identity()
    if config.correction.inter.depends_on_batch:
        inter["batch_size"] = ablation.request.batch_size
    backend = get_backend(ablation.backend, ablation.model.device).name
    sampling = {**config.sampling.drawn_with(), "seed": config.sampling.seed}
    identity = {
        "model": ablation.model.digest,
        "calibrate": config.stage_digest("calibrate"),
        "quantize": config.stage_digest("quantize"),
        "sample": digest_of({"sampling": sampling, "inter": inter, "backend": backend}),
        "protocol": digest_of(
            {
                "num_samples": ablation.request.count,
                "network": network.sha256 if network else None,
                "reference": reference.digest if reference else None,
                "metrics": ablation.protocol.metrics,
                "seed": ablation.protocol.seed,
                "version": __version__,
            }
        ),
    }
    return {**identity, "row": digest_of(identity)}


def _finished(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The row on disk if it was made from just these inputs."""
    try:
        found = read_json(path, "qncd ablate")
    except ArtifactError:
        return None
    if not isinstance(found, dict) or not {"row", "full"} <= found.keys():
        return None
    return found if found["row"].get("digests") == identity else None


def _table(config: Config, ablation: _Ablation) -> dict[str, Any]:
    more = {
        "model": ablation.model.digest,
        "first_seed": config.sampling.seed,
        "seeds": ranges(ablation.request.seeds(config)),
        "sampling": config.sampling.drawn_with(),
    }
    return {
        "model": ablation.model.source,
        "protocol": describe(ablation.protocol, ablation.request.count, more),
        "full": None,
        "rows": [],
    }


# ------------------------------------------------------------------ one row


def _measure(variant: Variant, identity: dict[str, Any], ablation: _Ablation) -> dict[str, Any]:
    """The row, and what was measured of full precision beside it."""
    config, model, request = variant.config, ablation.model, ablation.request
    seconds: dict[str, float] = {}
    with _clock(seconds, "calibrate"):
        shared = RunDir(request.folder / "calibration" / identity["calibrate"])
        calibration, smoothing, calibrated = pipeline.calibrate(
            shared,
            config,
            model,
            ablation.track,
            force=ablation.force(shared.path),
            tell=ablation.tell,
        )
    with _clock(seconds, "quantize"):
        made = RunDir(request.folder / "quantized" / identity["quantize"])
        force = ablation.force(made.path)
        reused = pipeline.quantize(
            *(made, config, model, calibration, smoothing, ablation.track),
            force=force,
            tell=ablation.tell,
            also=ablation.statistics,
        )
    with _clock(seconds, "sample"):
        folder = _sample(variant, made, ablation)
        identity = identify(config, ablation)  # the first row may have settled the backend
    if ablation.full is None:
        ablation.full = _full_set(config, ablation)
    with _clock(seconds, "evaluate"):
        _, samples = match_sets(ablation.full.samples, read_set(folder))
        measured = evaluate.measure_set(samples, ablation.protocol, ablation.track)
        coverage = read_coverage(made.coverage, "qncd ablate")
        sizes = evaluate.sizes(made.tensors("quantized"), coverage)
        protocol, track = ablation.protocol, ablation.track
        metrics = evaluate.compare(ablation.full, measured, sizes, protocol, track)
    quantization = variant.config.quantization
    row = {
        "preset": variant.name,
        "weights": quantization.weights.bits,
        "activations": quantization.activations.bits,
        **rendering.fidelity(metrics["fidelity"]),
        **rendering.distribution(metrics["quantized"]),
        "bytes": sizes["quantized"],
        "artifact_bytes": sizes["artifact"],
        **{key: coverage[key] for key in ("bit_operations", "mean_weight_bits", "mean_input_bits")},
        "extra_calls": samples.manifest["extra_calls"],
        "seconds": round(sum(seconds.values()), 2),
        "seconds_by_stage": {name: round(value, 2) for name, value in seconds.items()},
        "reused": [n for n, was in (("calibrate", calibrated), ("quantize", reused)) if was],
        "digests": identity,
    }
    full = rendering.distribution(metrics["full"])
    return {"row": row, "full": {**full, "bytes": sizes["full"]}}


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _sample(variant: Variant, made: RunDir, ablation: _Ablation) -> Path:
    """Draw the row's images; those of other settings in its folder are removed first."""
    config, request = variant.config, ablation.request
    artifact = artifacts.read(made.tensors("quantized"), "quantized")
    noise_stats = artifacts.read(made.tensors("noise_stats"), "noise_stats")
    macs = read_coverage(made.coverage, "qncd ablate")["macs"]
    folder, seeds, batch = request.samples(variant), request.seeds(config), request.batch(macs)
    sample.check(config, ablation.model, noise_stats, seeds)
    begun = _manifest(folder)
    how = Preparation(
        seeds,
        batch,
        macs,
        made.path / GRAPHS_FOLDER,
        ablation.tell,
        ablation.backend,
        begun=begun,
        table=_cache(ablation),
    )
    sampled = prepare(config, ablation.model, (artifact, noise_stats), how)
    if sampled.backend is not None and sampled.backend.name != ablation.backend:
        ablation.backend = sampled.backend.name
        ablation.tell(f"  backend {ablation.backend}: {sampled.backend.remark}")
    drawing = sample.SampleRequest(folder, seeds, batch)
    digest = sample.identify(config, ablation.model, sampled, drawing)["digest"]
    if ablation.force(folder) or (begun is not None and begun.get("digest") != digest):
        sample_sets.clear(folder)
    sample.run(config, ablation.model, sampled, drawing, ablation.track)
    return folder


def _cache(ablation: _Ablation) -> BackendCache:
    """What holds for all rows: they are compared with each other."""
    folder = ablation.request.folder / GRAPHS_FOLDER
    return BackendCache(folder, {"model": ablation.model.digest}, graphs=False)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Manifest of the samples in a folder, None where none is there; empty where it is damaged."""
    try:
        return sample_sets.begun(folder)
    except ArtifactError:
        return {}


def _full_set(config: Config, ablation: _Ablation) -> Measured:
    """Full-precision samples of the rows' seeds, shared with the runs beside this folder."""
    request = ablation.request
    seeds = request.seeds(config)
    macs = sum(cost.macs for cost in denoiser_costs(config, ablation.model))
    folder = pipeline.full_precision_samples(
        request.folder.parent, config, ablation.model, seeds, request.batch(macs), ablation.track
    )
    samples = read_set(folder).cut(seeds)
    return evaluate.measure_set(samples, ablation.protocol, ablation.track)
