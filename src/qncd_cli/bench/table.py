"""Speed, memory and size of one model's denoiser, full precision beside quantized.

Quantized rows compute with a quick artifact (preset minmax, one calibration input): time, memory
and size do not depend on the values in it. Rows are timed in turn, round after round in one
process, so that all of them meet the same noise of the machine; memory and loading are measured
before that, each row in a process of its own.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import machine
from ..backends.compiled.compiler import CACHE, environment
from ..backends.compiled.graph import silence_compiler
from ..config import presets
from ..config.loading import parse_config
from ..config.schema import Config
from ..errors import BackendUnavailable
from ..models.denoiser_folder import save_denoiser
from ..models.loading import DTYPES, DiffusionModel
from ..progress import Track, no_progress
from ..runtime.compiled_graph import GRAPHS_FOLDER
from ..runtime.denoiser import Denoiser, denoiser_costs
from ..stages import calibrate as calibrate_stage
from ..stages import quantize as quantize_stage
from ..store import artifacts
from ..store.artifacts import Artifact
from .profile import profile_calls
from .row import (
    BASELINE,
    FACTS,
    Alone,
    Guest,
    Inputs,
    Row,
    build,
    measure_alone,
    reason,
    with_graph,
)
from .timing import time_rows, timings

Tell = Callable[[str], None]
SIZES = ("disk_bytes", "integer_macs_share")
TIMESTEP = 500.0
WARM_UP = 2
"""Calls before the first round: one prepares, one more fills caches."""


@dataclass(frozen=True)
class BenchRequest:
    """rows: in the order of the table; batch_size: samples in a call, guidance counted in.

    alone: also measure memory and loading; profile: also say where the time goes; guests: rows that
    others compute, of which time alone is measured.
    """

    rows: Sequence[Row]
    batch_size: int
    rounds: int
    alone: bool = True
    profile: bool = False
    guests: Sequence[Guest] = ()


@dataclass
class _Bench:
    """What the rows of one call share.

    floats: the denoiser by dtype; calibrated: calibration and smoothing; made: by widths, the
    artifact and the share of the MACs that integer kernels can compute with it.
    """

    config: Config
    model: DiffusionModel
    request: BenchRequest
    inputs: Inputs
    folder: Path
    tell: Tell
    track: Track
    floats: dict[str, nn.Module]
    calibrated: tuple[Artifact, Artifact] | None = None
    made: dict[tuple[int, int], tuple[Artifact, float]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def available(self) -> list[Row]:
        return [row for row in self.request.rows if row.name not in self.unavailable]

    def drop(self, row: Row, why: str) -> None:
        self.unavailable[row.name] = why
        self.tell(f"{row.name}: {why}")


def run(
    config: Config,
    model: DiffusionModel,
    request: BenchRequest,
    tell: Tell,
    track: Track = no_progress,
) -> dict[str, Any]:
    """The content of bench.json. model: in float32 on the CPU; tell: receives remarks.

    A row that cannot be measured here is listed with the reason; BackendUnavailable if none can.
    """
    start = time.perf_counter()
    silence_compiler()
    macs = sum(cost.macs for cost in denoiser_costs(config, model))
    with (
        tempfile.TemporaryDirectory(prefix="qncd-bench-") as name,
        environment(CACHE, f"{name}/inductor"),  # a row is compiled only once, none before
    ):
        inputs = _inputs(config, model, request.batch_size)
        floats = {"float32": model.denoiser}
        bench = _Bench(config, model, request, inputs, Path(name), tell, track, floats)
        for row in request.rows:
            if why := row.why_unavailable():
                bench.drop(row, why)
        for row in bench.available():
            _prepare(row, bench)
        alone = _measure_alone(bench) if request.alone else {}
        denoisers = _warm(bench)
        guests = _prepare_guests(bench)
        if not denoisers and not guests:
            name, why = next(iter(bench.unavailable.items()))
            raise BackendUnavailable(f"no row can be measured here; {name}: {why}")
        rows = bench.available()
        calls = {row.name: inputs.call(denoisers[row.name]) for row in rows} | guests
        timed = [*rows, *(guest.row for guest in request.guests if guest.row.name in guests)]
        seconds, rates = time_rows(timed, calls, request.rounds, track)
        table = timings(timed, seconds, rates, 2 * macs * request.batch_size)
        for row, entry in zip(timed, table, strict=True):
            sizes = dict.fromkeys(SIZES) if row.name in guests else _sizes(row, bench)
            entry |= sizes | alone.get(row.name, dict.fromkeys(FACTS))
        profile = _profiles(rows, denoisers, calls) if request.profile else None
    return {
        "model": model.source,
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),
        "macs": macs,
        "batch_size": request.batch_size,
        "rounds": request.rounds,
        "machine": machine.described(),
        "rates": rates,
        "rows": table,
        "unavailable": bench.unavailable,
        "profile": profile,
        "seconds": round(time.perf_counter() - start, 1),
    }


# ------------------------------------------------------------------ what the rows need


def _inputs(config: Config, model: DiffusionModel, batch_size: int) -> Inputs:
    labels = model.labels(list(range(batch_size)), config.sampling.classes)
    x = torch.randn(batch_size, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return Inputs(x, TIMESTEP, model.condition(labels))


def _prepare(row: Row, bench: _Bench) -> None:
    """The denoiser in the row's dtype, and its artifact."""
    if row.dtype not in bench.floats:
        module = copy.deepcopy(bench.model.denoiser)
        bench.floats[row.dtype] = module.to(DTYPES[row.dtype])
    if row.widths is not None and row.widths not in bench.made:
        bench.made[row.widths] = _quantize(row.widths, bench)


def _quantize(widths: tuple[int, int], bench: _Bench) -> tuple[Artifact, float]:
    """An entry of bench.made; the artifact is on disk. All widths share one calibration."""
    config = quick_config(bench.config, widths)
    if bench.calibrated is None:
        bench.calibrated = calibrate_stage.run(config, bench.model, bench.track)
        assert bench.calibrated is not None  # this process is alone
    result = quantize_stage.run(config, bench.model, *bench.calibrated, bench.track)
    assert result is not None
    path = bench.folder / f"w{widths[0]}a{widths[1]}.safetensors"
    return artifacts.write(path, result.quantized), result.coverage["integer_macs_share"]


def quick_config(config: Config, widths: tuple[int, int]) -> Config:
    """The configuration's model at other widths, as preset minmax makes it, in few calls."""
    tree = config.to_dict()
    sampling = {key: tree["sampling"][key] for key in ("scheduler", "classes")}
    quick = {
        "model": tree["model"],
        "sampling": {**sampling, "steps": 1, "guidance_scale": 1.0},
        "calibration": {"trajectories": 1, "batch_size": 1, "noise_trajectories": 1},
        "quantization": {
            "preset": "minmax",
            "weights": {"bits": widths[0]},
            "activations": {"bits": widths[1]},
            "cache_time_embeddings": tree["quantization"]["cache_time_embeddings"],
        },
    }
    return parse_config(presets.filled(quick, 1), "bench")


def _sizes(row: Row, bench: _Bench) -> dict[str, Any]:
    """disk_bytes: of everything that the row's denoiser is read from.

    A quantized row needs its packed artifact and, in row.dtype, what the artifact leaves out.
    """
    tensors = bench.floats[row.dtype].state_dict()
    stored, share = 0, None
    if row.widths is not None:
        artifact, share = bench.made[row.widths]
        assert artifact.path is not None
        stored = artifact.path.stat().st_size
        replaced = artifact.body["layers"]
        tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[0] not in replaced}
    stored += sum(t.numel() * t.element_size() for t in tensors.values())
    return {"disk_bytes": stored, "integer_macs_share": share}


# ------------------------------------------------------------------ alone


def _measure_alone(bench: _Bench) -> dict[str, dict[str, Any]]:
    """measure_alone's facts by row, one process after the other; a row that fails is dropped."""
    path = bench.folder / "inputs.pt"
    bench.inputs.save(path)
    for dtype in {row.dtype: None for row in bench.available()}:
        save_denoiser(bench.floats[dtype], bench.folder / dtype)
    facts = {}
    rows = bench.available()
    for row in bench.track(rows, "loading each row alone", len(rows), "rows"):
        made = bench.made[row.widths][0].path if row.widths is not None else None
        cached = bench.config.quantization.cache_time_embeddings
        threads = torch.get_num_threads()
        graphs = bench.folder / GRAPHS_FOLDER
        job = Alone(row, bench.folder / row.dtype, made, path, graphs, cached, threads)
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found = pool.submit(measure_alone, job).result()
        except BrokenProcessPool:
            found = {"why": "its process was killed (out of memory?)"}
        if "why" in found:
            bench.drop(row, found["why"])
        else:
            facts[row.name] = found
    return facts


# ------------------------------------------------------------------ together


def _warm(bench: _Bench) -> dict[str, Denoiser]:
    """Every row's denoiser, prepared by its first calls; a row that fails is dropped."""
    denoisers = {}
    rows = bench.available()
    for row in bench.track(rows, "preparing rows", len(rows), "rows"):
        module = bench.floats[row.dtype]
        if row.channels_last and module is bench.model.denoiser:
            module = copy.deepcopy(module)  # the baseline keeps its own layout
        artifact = bench.made[row.widths][0] if row.widths is not None else None
        cached = bench.config.quantization.cache_time_embeddings
        try:
            denoiser = build(row, module, artifact, cached)
            denoiser = with_graph(row, denoiser, bench.inputs, bench.folder / GRAPHS_FOLDER)
            for _ in range(WARM_UP):
                bench.inputs.call(denoiser)()
        except Exception as error:  # as when the row runs alone
            bench.drop(row, reason(error))
            continue
        denoisers[row.name] = denoiser
    return denoisers


def _prepare_guests(bench: _Bench) -> dict[str, Callable[[], Any]]:
    """Their calls by name, warm; one that fails is listed with the reason."""
    calls = {}
    guests = bench.request.guests
    for guest in bench.track(guests, "preparing guests", len(guests), "rows"):
        folder = bench.folder / guest.row.name
        folder.mkdir()
        try:
            call = guest.prepare(copy.deepcopy(bench.model.denoiser), bench.inputs, folder)
            for _ in range(WARM_UP):
                call()
        except Exception as error:  # whatever somebody else's tool can stumble over
            bench.drop(guest.row, reason(error))
            continue
        calls[guest.row.name] = call
    return calls


def _profiles(
    rows: Sequence[Row], denoisers: Mapping[str, Denoiser], calls: Mapping[str, Callable]
) -> dict[str, dict[str, Any]]:
    """Profiles of the baseline and the int8 rows: compiled code does not say which module it is."""
    chosen = [row.name for row in rows if row.name == BASELINE or row.backend == "int8"]
    return {name: profile_calls(denoisers[name].module, calls[name]) for name in chosen}
