"""Before anything is run: layers, MACs, bytes, memory, disk and time of a configuration.

Everything follows from shapes: the denoiser is on the meta device, no weight is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..backends.base import get_backend
from ..backends.roofline import microbenchmarks
from ..config.schema import Config
from ..errors import BackendUnavailable
from ..lineage.sample_set import SHEET_IMAGES
from ..lineage.sample_sets import default_batch
from ..machine import available_disk, available_memory
from ..models.loading import DTYPES, known_classes
from ..models.topology import LayerCost, count_macs
from ..ptq.coverage import coverage_of
from ..ptq.layer_plan import plan_layers
from ..ptq.reconstruct import CACHE_BYTES
from ..sampling.levels import with_timesteps
from ..sampling.parametrization import FLOW, prediction_type
from ..sampling.samplers import make_scheduler
from ..spec import FLOAT_BITS
from ..stages.sample import TRACED
from ..store.artifacts import Artifact
from ..store.layer_entry import layer_entries
from ..vocabulary import megabytes
from . import (
    activations as call_memory,
)
from . import (
    artifacts as foreseen,
)
from . import (
    memory as footprint,
)
from . import (
    work as workload,
)
from .memory import Foreseen, Machine
from .shapes import DENOISERS, Shapes

RATE_SECONDS = 0.3
"""Seconds that each rate of the machine is measured; longer: a steadier forecast."""
ELEMENTS = 1 << 22
SHEET_SCALE = 2  # of the contact sheet's pixels, per side


@dataclass(frozen=True)
class Request:
    """What is to be run: stages, of which all are forecast and these have to fit.

    sampling: the configuration that samples are drawn with, count of them in batches (None: of the
    default size); run_dir:
    where all is written; imports: bytes of this process before it did anything.
    """

    stages: tuple[str, ...]
    sampling: Config
    count: int
    batch_size: int | None
    backend: str
    run_dir: Path
    imports: int


def run(config: Config, shapes: Shapes, request: Request) -> dict[str, Any]:
    """The forecast as a tree for JSON: of main memory, with everything on the CPU.

    Raises ModelError for classes that the model does not have.
    """
    for one in (config, request.sampling):
        known_classes(shapes.source, shapes.classes or None, one.sampling.classes)
    times = _timesteps(config, shapes)
    calibration = foreseen.calibration(config, shapes, times)
    smoothing = foreseen.smoothing(config, shapes)
    quantized = foreseen.quantized(config, shapes, calibration, smoothing)
    with torch.no_grad():
        costs = count_macs(shapes.denoiser, lambda: shapes.call(1))
    covered = coverage_of(
        config, shapes.denoiser, costs, quantized, shapes.denoiser_element_bytes()
    )
    batch_size = request.batch_size or default_batch(covered["macs"])
    result = _result(config, shapes, covered, quantized)
    backend = get_backend(request.backend, "cpu").name
    sizes = Foreseen.of(calibration, smoothing, quantized)
    stages = _stages(config, shapes, request, batch_size, backend, costs, sizes, quantized)
    noise = foreseen.noise_stats(config, shapes, times)
    disk = {
        "calibrate": sum(map(foreseen.file_bytes, (calibration, smoothing))),
        "quantize": result["artifact_bytes"] + foreseen.file_bytes(noise) + _temporary(config),
        "sample": _samples_bytes(shapes, request),
    }
    available = {"memory": available_memory(), "disk": available_disk(request.run_dir)}
    for stage in stages:
        stage["disk_bytes"] = disk[stage["stage"]]
        memory = available["memory"]
        stage["fits"] = memory is None or stage["needed_bytes"] <= memory
    return {
        "source": shapes.source,
        "parameters": covered["float_denoiser_bytes"] // 4,
        "coverage": covered,
        "result": result,
        "stages": stages,
        "available": available,
        "backend": backend,
        "samples": request.count,
        "batch_size": batch_size,
        "does_not_fit": _problems(request.stages, stages, available),
    }


def check(report: dict[str, Any]) -> None:
    """Raise BackendUnavailable (hardware) where the forecast says that it will not fit."""
    if report["does_not_fit"]:
        raise BackendUnavailable(
            "; ".join(report["does_not_fit"]),
            "take a smaller calibration.batch_size, --batch-size or --num, "
            "quantization.weights.rounding=nearest, or a larger machine",
        )


def _timesteps(config: Config, shapes: Shapes) -> list[float]:
    sampling = config.sampling
    if shapes.scheduler is None:
        return [float(t) for t in range(sampling.steps)]
    scheduler = make_scheduler(sampling.scheduler, shapes.scheduler)
    if prediction_type(scheduler) == FLOW:  # a step a timestep, wherever the shift puts them
        return [float(t) for t in range(sampling.steps)]
    timed = with_timesteps(scheduler, sampling.steps, sampling.eta)
    return [float(t) for t in timed.timesteps]


# ------------------------------------------------------------------ bytes


def _result(
    config: Config, shapes: Shapes, covered: dict[str, Any], quantized: Artifact
) -> dict[str, Any]:
    """quantized.safetensors, with the bits that quantization.sensitive or a budget spends, and
    what the denoiser needs beside it.

    Which layers get those bits is measured while quantizing: of coverage's means over MACs they are
    no part. extra_weight_bits: mean over weights; extra_input_bits: mean over MACs, at most.
    """
    plans = plan_layers(config, shapes.denoiser)
    spent = foreseen.extra_weight_bits(config, plans)
    entries = layer_entries(quantized.body).values()
    codes = sum(entry.weights for entry in entries if entry.weight_bits != FLOAT_BITS)
    average = covered["average_weight_bits"]
    whole = foreseen.result_bytes(config, shapes, quantized)
    weights = covered["weight_code_bytes"] + spent // 8
    return {
        "bytes": whole + covered["rest_bytes"],
        "artifact_bytes": whole,
        "weight_bytes": weights,
        "other_bytes": whole - weights,
        "rest_bytes": covered["rest_bytes"],
        "float32_bytes": covered["float_denoiser_bytes"],
        "share_of_float32": (whole + covered["rest_bytes"]) / covered["float_denoiser_bytes"],
        "average_weight_bits": None if average is None else average + spent / codes,
        "extra_weight_bits": spent / codes if codes else 0.0,
        "extra_input_bits": foreseen.extra_input_bits(config, plans),
    }


def _samples_bytes(shapes: Shapes, request: Request) -> int:
    """Images at a byte per value: what PNG takes at most. Their latents lie there twice for a
    moment: in the batches' files and in one."""
    steps = len(_timesteps(request.sampling, shapes))
    latents = foreseen.latents(shapes, request.count, min(TRACED, request.count), steps)
    sheet = min(SHEET_IMAGES, request.count) * SHEET_SCALE**2
    images = (request.count + sheet) * torch.Size(shapes.image_shape).numel()
    return images + 2 * foreseen.file_bytes(latents)


def _temporary(config: Config) -> int:
    """Bytes that learnt rounding keeps on disk: the calls of several blocks."""
    learnt = config.quantization.weights.rounding in ("adaround", "brecq")
    return CACHE_BYTES if learnt else 0


# ------------------------------------------------------------------ stages


def _stages(
    config: Config,
    shapes: Shapes,
    request: Request,
    batch_size: int,
    backend: str,
    costs: list[LayerCost],
    sizes: Foreseen,
    quantized: Artifact,
) -> list[dict[str, Any]]:
    machine = Machine(_copies(config, shapes), backend == "int8")
    drawing = Machine(_copies(request.sampling, shapes), backend == "int8")
    work = call_memory.meter(config, shapes, quantized)
    held = footprint.resident(shapes, DTYPES[config.model.dtype])
    rest = footprint.resident(shapes, DTYPES[request.sampling.model.dtype], DENOISERS)
    known = (config, shapes, held, sizes, work, machine)
    batch = min(request.count, batch_size)
    phases = {
        "calibrate": footprint.calibrate_phases(*known),
        "quantize": footprint.quantize_phases(*known),
        "sample": footprint.sample_phases(shapes, rest, sizes, work, drawing, batch),
    }
    steps, drawn = (len(_timesteps(c, shapes)) for c in (config, request.sampling))
    decoding = _decoding_macs(shapes)
    amounts = {
        "calibrate": workload.calibrate_work(config, shapes, costs, steps, machine),
        "quantize": workload.quantize_work(config, shapes, costs, steps, machine, work),
        "sample": workload.sample_work(costs, drawn, drawing, request.count, decoding),
    }
    rates = measured_rates()
    started = request.imports + round(footprint.KERNELS)
    mapped = dict.fromkeys(phases, footprint.mapped(shapes))
    mapped["sample"] = footprint.mapped(shapes, DENOISERS)
    stages = []
    for name, found in phases.items():
        highest = max(found, key=lambda phase: found[phase])
        needed = {p: size - (p != footprint.LOADING) * mapped[name] for p, size in found.items()}
        neediest = max(needed, key=lambda phase: needed[phase])
        stages.append(
            {
                "stage": name,
                "peak_bytes": started + round(found[highest]),
                "at": highest,
                "mapped_bytes": mapped[name],
                "needed_bytes": started + round(needed[neediest]),
                "needed_at": neediest,
                "phases": {phase: started + round(size) for phase, size in found.items()},
                "macs": round(amounts[name].macs),
                "seconds": amounts[name].seconds(*rates),
            }
        )
    return stages


def _copies(config: Config, shapes: Shapes) -> int:
    """Rows of a denoiser call per sample."""
    return 2 if shapes.guides(config.sampling.guidance_scale) else 1


def _decoding_macs(shapes: Shapes) -> int:
    if shapes.first_stage is None:
        return 0
    with torch.no_grad():
        return workload.total(count_macs(shapes.first_stage, lambda: shapes.decode(1)))


def measured_rates() -> tuple[float, float]:
    """MACs and elements per second of this machine in float32, each in well under a second."""
    products = microbenchmarks("float32")
    macs = max(p.operations / 2 / _fastest(p.call) for p in products)
    x = torch.ones(ELEMENTS)
    return macs, ELEMENTS / _fastest(lambda: x * 2.0)


def _fastest(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of the calls within RATE_SECONDS, the first left out."""
    call()
    best, end = float("inf"), time.perf_counter() + RATE_SECONDS
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _problems(
    asked: tuple[str, ...], stages: list[dict[str, Any]], available: dict[str, int | None]
) -> list[str]:
    stages = [stage for stage in stages if stage["stage"] in asked]
    memory, free = available["memory"], available["disk"]
    highest = max(stages, key=lambda stage: stage["needed_bytes"])
    disk = sum(stage["disk_bytes"] for stage in stages)
    problems = []
    if memory is not None and not highest["fits"]:
        problems.append(
            f"{highest['stage']} takes about {megabytes(highest['needed_bytes'])} of memory "
            f"({highest['needed_at']}), {megabytes(memory)} are available"
        )
    if free is not None and disk > free:
        problems.append(f"up to {megabytes(disk)} of disk are needed, {megabytes(free)} are free")
    return problems
