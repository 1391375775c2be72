"""The sampled model: at full precision or quantized, and what computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..backends.base import Backend, get_backend
from ..config.schema import Config
from ..errors import BackendUnavailable
from ..models.loading import DiffusionModel
from ..quant.layers import QuantizedLayer
from ..store import artifacts
from ..store.artifacts import Artifact
from . import compiled as graphs
from .denoiser import Denoiser, full_denoiser, quantized_denoiser
from .exported_graph import example_of, in_openvino

WORTH_COMPILING = 2e4
"""Gain (see worth) that wins back the minutes of compiling; larger: fewer graphs are compiled."""


def worth(rows: int, macs: int) -> float:
    """Gain of a graph over so many rows of so many MACs each, in arbitrary units.

    rows: samples times calls, both halves of guidance counted; macs: of one row. Larger models do
    more arithmetic per value, so that a row gains less than in proportion to it: about with its
    square root, fitted by eye to the packaged models and LDM-4 (docs/results.md, Speed).
    """
    return rows * math.sqrt(macs / 1e9)


def copies(config: Config, model: DiffusionModel) -> int:
    """Rows of a sample in a call: two with guidance."""
    return 2 if model.guides(config.sampling.guidance_scale) else 1


@dataclass(frozen=True)
class Subject:
    """A model to draw samples from: the denoiser, and the digests of what it was made from.

    noise_stats: needed by every correction that uses statistics; backend: computes the quantized
    layers. None for full precision. compiled: whether the denoiser is one compiled graph.
    """

    kind: str  # "quantized" or "full"
    denoiser: Denoiser
    digests: dict[str, str]
    noise_stats: Artifact | None = None
    backend: Backend | None = None
    compiled: bool = False

    def fallbacks(self) -> dict[str, str]:
        """Quantized layers that the backend leaves to the simulation, with the reason."""
        if self.backend is None:
            return {}
        layers = self.denoiser.module.named_modules()
        reasons = {n: self.backend.why_not(m) for n, m in layers if isinstance(m, QuantizedLayer)}
        return {name: reason for name, reason in reasons.items() if reason}


def full_precision(model: DiffusionModel) -> Subject:
    return Subject("full", full_denoiser(model), {"model": model.digest})


def quantized(
    model: DiffusionModel,
    artifact: Artifact,
    noise_stats: Artifact,
    backend: str = "simulate",
    *,
    low_memory: bool = False,
    in_place: bool = False,
) -> Subject:
    """backend: a name or auto; low_memory, in_place: as `quantized_denoiser` has them.

    Raises BackendUnavailable, and ArtifactError where artifact, noise statistics and model do not
    belong together.
    """
    artifacts.check_lineage(artifact, model=model.digest)
    artifacts.check_lineage(noise_stats, model=model.digest, parents={"quantized": artifact.digest})
    cache = artifact.body["cache_time_embeddings"]
    chosen = get_backend(backend, model.device)
    denoiser = quantized_denoiser(
        model, artifact, chosen.name, cache, low_memory=low_memory, in_place=in_place
    )
    digests = {"model": model.digest, "quantized": artifact.digest}
    return Subject("quantized", denoiser, digests, noise_stats, chosen)


@dataclass(frozen=True)
class Compiling:
    """Whether to compile and where graphs are kept; tell hears what a user should know.

    macs: of one call on one sample, as the coverage of the quantized model says.
    wish: True, False, or None for "where it pays": a graph that lies in the folder is used, a new
    one is made where it is worth it; begun: whether the set that is being continued was
    drawn by a graph, None for a new set. What was begun goes on as it began.
    """

    folder: Path
    tell: graphs.Tell
    macs: int
    wish: bool | None = None
    begun: bool | None = None


def compiled(
    config: Config,
    model: DiffusionModel,
    subject: Subject,
    seeds: list[int],
    how: Compiling,
) -> Subject:
    """The subject with its denoiser compiled, or as it is where that is not wanted.

    With a backend that runs whole graphs it is always exported; full precision, which others are
    measured against, is compiled only where that is wished for. seeds: all that will be drawn.
    Raises BackendUnavailable where compiling is wished for by name and cannot be done.
    """
    if subject.backend is not None and subject.backend.whole and not how.wish:
        denoiser = in_openvino(
            subject.denoiser,
            subject.digests,
            example_of(model),
            how.folder,
            model.dtype,
            how.tell,
        )
        return replace(subject, denoiser=denoiser)
    wanted = how.begun if how.wish is None else how.wish
    if subject.backend is None and not wanted:
        return subject
    if subject.backend is not None and subject.backend.name != "int8":
        if how.wish:
            raise BackendUnavailable(
                f"--compile: backend {subject.backend.name} has no graph", "only int8 has one"
            )
        return subject
    if wanted is None:
        kept = graphs.graph_path(how.folder, subject.digests).is_file()
        calls = copies(config, model) * config.sampling.steps * len(seeds)
        wanted = kept or worth(calls, how.macs) >= WORTH_COMPILING
    if not wanted:
        return subject
    with torch.no_grad():
        condition = model.condition(model.labels(seeds[:1], config.sampling.classes))
    row = torch.zeros(1, *model.latent_shape, dtype=model.dtype), condition
    try:
        graph = graphs.compiled(subject.denoiser, subject.digests, row, how.folder, how.tell)
    except BackendUnavailable as error:
        if how.wish:
            raise
        how.tell(f"{error.message}; it runs uncompiled, more slowly")
        return subject
    return replace(subject, denoiser=graph, compiled=True)
