"""Preparation of a model for sampling: which denoiser, on which backend, compiled or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..backends.base import AUTO
from ..config.schema import Config
from ..errors import BackendUnavailable
from ..models.loading import DiffusionModel, first_stage_of
from ..spec import Compile
from ..store.artifacts import Artifact, check_lineage
from .auto_backend import BackendCache, backend_of_set, choose_backend
from .compiled_graph import compile_denoiser, has_graph
from .compiled_reuse import compile_reusing, has_graphs, patterns_of
from .denoiser import Denoiser
from .exported_graph import example_of, in_openvino
from .first_stage import compiled, with_integers
from .fused_graph import fuse_denoiser
from .reuse import ReusingDenoiser
from .sampled_model import SampledModel

WORTH_COMPILING = 2e4
"""Gain (see compiling_gain) that wins back the minutes of compiling; larger: fewer graphs are
compiled."""


@dataclass(frozen=True)
class Preparation:
    """What is known of the samples that a model will draw, and what was asked for.

    seeds: all that will be drawn, `batch_size` of them in a call.
    macs: of one call on one sample, as the coverage of the quantized model says.
    folder: where graphs are kept, and what backends took.
    tell: hears what a user should know.
    backend: a name or auto.
    compile: where it pays, a graph that lies in the folder is used, and a new one is made where
        that is worth it.
    low_memory: weights are unpacked at every call and not kept; nothing is compiled.
    in_place: the model's own denoiser becomes the quantized one, and its weights are freed.
    begun: manifest of the set that is gone on with, None for a new one. It goes on as it began
        where nothing else is asked for.
    table: of a row of a table, where the backend that all its rows share is remembered.
    """

    seeds: Sequence[int]
    batch_size: int
    macs: int
    folder: Path
    tell: Callable[[str], None]
    backend: str = AUTO
    compile: Compile = Compile.WHERE_IT_PAYS
    low_memory: bool = False
    in_place: bool = False
    begun: Mapping[str, Any] | None = None
    table: BackendCache | None = None


def prepare(
    config: Config,
    model: DiffusionModel,
    quantized: tuple[Artifact, Artifact] | None,
    how: Preparation,
    reuse: Artifact | None = None,
    first_stage: Artifact | None = None,
) -> SampledModel:
    """The model that the samples are drawn from, ready to be called.

    quantized: the quantized artifact and its noise statistics, None for full precision. reuse: the
    plan by which it leaves work out; first_stage: the decoder in integers, compiled where the
    denoiser is. What stays unquantized of it computes in bfloat16 where the denoiser does, else in
    float32: decoders of this field overflow float16.
    Raises BackendUnavailable where what was asked for by name cannot be had here, ArtifactError
    for artifacts that do not belong together and for damaged graphs.
    """
    sampled = _prepared(config, model, quantized, how, reuse)
    if first_stage is None or sampled.backend is None:
        return sampled
    check_lineage(first_stage, model=model.digest)
    own = first_stage_of(model)
    dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32
    decode = with_integers(own, first_stage, model.source, sampled.backend.name, dtype)
    if sampled.compiled and sampled.backend.name == "int8":
        digests = {"model": model.digest, "first_stage": first_stage.digest}
        decode = compiled(decode, digests, model.latent_shape, how.folder, how.tell)
    return sampled.decoding(decode, first_stage)


def _prepared(
    config: Config,
    model: DiffusionModel,
    quantized: tuple[Artifact, Artifact] | None,
    how: Preparation,
    reuse: Artifact | None,
) -> SampledModel:
    if model.branches:
        if how.compile is Compile.YES:
            raise BackendUnavailable(
                "--compile: a graph has no LoRA beside its layers", "leave --compile out"
            )
        how = replace(how, compile=Compile.NO)
    if quantized is None:
        sampled = SampledModel.full_precision(model)
        return _compile(config, model, sampled, how)
    backend = how.backend
    if how.table is None:
        backend = backend_of_set(backend, how.begun, model.device, low_memory=how.low_memory)
    sampled = SampledModel.quantized(
        model, *quantized, backend, low_memory=how.low_memory, in_place=how.in_place
    )
    assert sampled.backend is not None
    if model.branches:
        if sampled.backend.whole:
            raise BackendUnavailable(
                f"the graph of {sampled.backend.name} has no LoRA beside its layers",
                "use backend int8 or simulate, or qncd quantize --lora",
            )
        return sampled
    if reuse is not None:
        if sampled.backend.whole:
            raise BackendUnavailable(
                f"sampling.reuse: the graph of {sampled.backend.name} computes all of the denoiser",
                "use backend int8 or simulate, or --set sampling.reuse=null",
            )
        return _compile(config, model, sampled.reusing(reuse), how)
    if sampled.backend.whole and how.compile is not Compile.YES:
        sampled = _export(model, sampled, how)
    else:
        sampled = _compile(config, model, sampled, how)
    if backend != AUTO or how.compile is Compile.YES:
        return sampled
    cache = how.table or BackendCache(
        how.folder, sampled.graph_digests, how.low_memory, graphs=not how.low_memory
    )
    return choose_backend(
        model,
        sampled,
        cache,
        how.folder,
        how.tell,
        batch=rows_per_sample(config, model) * min(how.batch_size, len(how.seeds)),
        ahead=_rows_ahead(config, model, how),
    )


def rows_per_sample(config: Config, model: DiffusionModel) -> int:
    """Rows of a sample in a call of the denoiser: two with guidance."""
    return 2 if model.guides(config.sampling.guidance_scale) else 1


def _rows_ahead(config: Config, model: DiffusionModel, how: Preparation) -> int:
    """Rows of all calls that the samples take, those of corrections aside."""
    return rows_per_sample(config, model) * config.sampling.calls * len(how.seeds)


def compiling_gain(rows: int, macs: int) -> float:
    """Gain of a graph over so many rows of so many MACs each, in arbitrary units.

    rows: samples times calls, both halves of guidance counted; macs: of one row. Larger models do
    more arithmetic per value, so that a row gains less than in proportion to it: about with its
    square root, fitted by eye to the packaged models and LDM-4 (docs/results.md, Speed).
    """
    return rows * math.sqrt(macs / 1e9)


def _export(model: DiffusionModel, sampled: SampledModel, how: Preparation) -> SampledModel:
    """Run by the graph of a backend that runs whole graphs."""
    denoiser = in_openvino(
        sampled.denoiser,
        sampled.graph_digests,
        example_of(model),
        how.folder,
        model.dtype,
        how.tell,
    )
    return replace(sampled, denoiser=denoiser)


def _compile(
    config: Config, model: DiffusionModel, sampled: SampledModel, how: Preparation
) -> SampledModel:
    """With its denoiser compiled, or as it is where that is not wanted.

    Full precision, which others are measured against, is compiled only where that is asked for.
    """
    asked = how.compile is Compile.YES
    fuses = sampled.backend is not None and sampled.backend.fuses
    fuses = fuses and not isinstance(sampled.denoiser, ReusingDenoiser)
    if sampled.backend is not None and sampled.backend.name != "int8" and not fuses:
        if asked:
            raise BackendUnavailable(
                f"--compile: backend {sampled.backend.name} has no graph"
                + (" that leaves work out" if sampled.backend.fuses else ""),
                "int8 has one",
            )
        return sampled
    if not (_is_asked_for(how) if fuses else _wants_graph(config, model, sampled, how)):
        return sampled
    with torch.no_grad():
        condition = model.condition(model.labels([*how.seeds[:1]], config.sampling.classes))
    row = torch.zeros(1, *model.latent_shape, dtype=model.dtype), condition
    if fuses:
        return replace(sampled, denoiser=fuse_denoiser(sampled.denoiser, row), compiled=True)
    place = sampled.graph_digests, row, how.folder, how.tell
    try:
        if isinstance(sampled.denoiser, ReusingDenoiser):
            graph: Denoiser = compile_reusing(sampled.denoiser, *place)
        else:
            graph = compile_denoiser(sampled.denoiser, *place)
    except BackendUnavailable as error:
        if asked:
            raise
        how.tell(f"{error.message}; it runs uncompiled, more slowly")
        return sampled
    return replace(sampled, denoiser=graph, compiled=True)


def _wish(how: Preparation) -> Compile:
    """Whether a graph was asked for, or the set began with one."""
    if how.low_memory:
        return Compile.NO
    if how.begun:
        return how.compile.going_on(bool(how.begun.get("compiled")))
    return how.compile


def _is_asked_for(how: Preparation) -> bool:
    """Whether a graph whose numbers differ by float rounding is wanted: only where it is said."""
    return _wish(how) is Compile.YES


def _wants_graph(
    config: Config, model: DiffusionModel, sampled: SampledModel, how: Preparation
) -> bool:
    wish = _wish(how)
    if wish is not Compile.WHERE_IT_PAYS:
        return wish is Compile.YES
    if sampled.backend is None:
        return False
    gain = compiling_gain(_rows_ahead(config, model, how), how.macs)
    if isinstance(sampled.denoiser, ReusingDenoiser):
        pattern = sampled.denoiser.pattern
        if has_graphs(how.folder, sampled.graph_digests, pattern):
            return True
        assert config.sampling.reuse is not None
        return gain * config.sampling.reuse >= WORTH_COMPILING * len(patterns_of(pattern))
    return has_graph(how.folder, sampled.graph_digests) or gain >= WORTH_COMPILING
