"""Before anything is run: layers, MACs, bytes, memory, disk and time of a configuration.

Everything follows from shapes: the denoiser is on the meta device, no weight is read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..backends import onednn
from ..backends.base import get_backend
from ..config.schema import Config
from ..errors import BackendUnavailable
from ..lineage.sample_set import SHEET_IMAGES
from ..lineage.sample_sets import TRACED, default_batch
from ..machine import available_disk, available_memory, device_memory
from ..models.loading import DTYPES, known_classes
from ..models.topology import LayerCost, count_macs
from ..ptq.cost import INTEGERS, NARROW_INTEGERS, SIMULATION, Cost
from ..ptq.coverage import coverage_of
from ..ptq.layer_plan import plan_layers
from ..sampling.levels import visited, with_timesteps
from ..sampling.parametrization import FLOW, prediction_type
from ..sampling.samplers import make_scheduler
from ..spec import FLOAT_BITS
from ..stages import calibrate, quantize, sample
from ..store.artifacts import Artifact
from ..store.layer_entry import layer_entries
from ..vocabulary import megabytes
from . import activations, artifacts, first_stage, memory, text_encoders
from .memory import Foreseen
from .partial import partial_bytes
from .shapes import DENOISERS, Shapes
from .work import Clock, measured_rates

CPU = torch.device("cpu")
SHEET_SCALE = 2  # of the contact sheet's pixels, per side


@dataclass(frozen=True)
class Request:
    """What is to be run: stages, of which all are forecast and these have to fit.

    sampling: the configuration that samples are drawn with, count of them in batches (None: of the
    default size); run_dir: where all is written; imports: bytes of this process before it did
    anything; clock: of the rates that are measured; device: where the stages are to run.
    """

    stages: tuple[str, ...]
    sampling: Config
    count: int
    batch_size: int | None
    backend: str
    run_dir: Path
    imports: int
    clock: Clock = time.perf_counter
    device: torch.device = CPU


def run(config: Config, shapes: Shapes, request: Request) -> dict[str, Any]:
    """The forecast as a tree for JSON: of main memory, with everything on the CPU.

    On a GPU no more than the same lies there, the libraries of this process aside: device_bytes of
    a stage has to be free there, too. Times are the CPU's.

    Raises ModelError for classes that the model does not have.
    """
    for one in (config, request.sampling):
        known_classes(shapes.source, shapes.classes or None, one.sampling.classes)
    times = _timesteps(config, shapes)
    calibration = artifacts.calibration(config, shapes, times)
    smoothing = artifacts.smoothing(config, shapes)
    quantized = artifacts.quantized(config, shapes, calibration, smoothing)
    with torch.no_grad():
        costs = count_macs(shapes.denoiser, lambda: shapes.call(1))
    covered = coverage_of(
        config, shapes.denoiser, costs, quantized, shapes.denoiser_element_bytes()
    )
    batch_size = request.batch_size or default_batch(covered["macs"])
    result = _result(config, shapes, covered, quantized)
    backend = get_backend(request.backend, request.device).name
    sizes = Foreseen.of(calibration, smoothing, quantized)
    noise = artifacts.noise_stats(config, shapes, times)
    text = text_encoders.artifact(config, shapes)
    text_bytes = 0 if text is None else artifacts.file_bytes(text)
    decoder = first_stage.artifact(config, shapes)
    decoder_bytes = 0 if decoder is None else artifacts.file_bytes(decoder)
    beside = artifacts.file_bytes(noise) + text_bytes + decoder_bytes
    disk = {
        "calibrate": sum(map(artifacts.file_bytes, (calibration, smoothing))),
        "quantize": result["artifact_bytes"] + beside,
        "sample": _samples_bytes(shapes, request),
    }
    before = text_encoders.cost(config, shapes, text)
    stages = _stages(
        *(config, shapes, request, batch_size, backend, costs, sizes, quantized, before, disk)
    )
    available = {
        "memory": available_memory(),
        "disk": available_disk(request.run_dir),
        "device": device_memory(request.device),
    }
    for stage in stages:
        needs = (("memory", "needed_bytes"), ("device", "device_bytes"))
        stage["fits"] = all(_fits(stage[bytes_], available[where]) for where, bytes_ in needs)
    return {
        "source": shapes.source,
        "parameters": covered["float_denoiser_bytes"] // 4,
        "coverage": covered,
        "result": result,
        "text_encoders_bytes": text_bytes,
        "stages": stages,
        "available": available,
        "backend": backend,
        "device": str(request.device),
        "samples": request.count,
        "batch_size": batch_size,
        "does_not_fit": _problems(request, stages, available),
    }


def _fits(size: int, free: int | None) -> bool:
    return free is None or size <= free


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
        return [float(t) for t in range(sampling.calls)]
    scheduler = make_scheduler(sampling.scheduler, shapes.scheduler)
    if prediction_type(scheduler) == FLOW:  # a step a timestep, wherever the shift puts them
        return [float(t) for t in range(sampling.calls)]
    timed = with_timesteps(scheduler, sampling.steps, sampling.eta, strength=sampling.strength)
    return [float(t) for t in visited(timed)]


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
    spent = artifacts.extra_weight_bits(config, plans)
    entries = layer_entries(quantized.body).values()
    codes = sum(entry.weights for entry in entries if entry.weight_bits != FLOAT_BITS)
    average = covered["average_weight_bits"]
    whole = artifacts.result_bytes(config, shapes, quantized)
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
        "extra_input_bits": artifacts.extra_input_bits(config, plans),
    }


def _samples_bytes(shapes: Shapes, request: Request) -> int:
    """Images at a byte per value: what PNG takes at most. Their latents lie there twice for a
    moment: in the batches' files and in one."""
    steps = len(_timesteps(request.sampling, shapes))
    latents = artifacts.latents(shapes, request.count, min(TRACED, request.count), steps)
    sheet = min(SHEET_IMAGES, request.count) * SHEET_SCALE**2
    images = (request.count + sheet) * torch.Size(shapes.image_shape).numel()
    return images + 2 * artifacts.file_bytes(latents)


# ------------------------------------------------------------------ stages


def _stages(
    config: Config,
    shapes: Shapes,
    request: Request,
    batch_size: int,
    backend: str,
    macs: list[LayerCost],
    sizes: Foreseen,
    quantized: Artifact,
    before: dict[str, Cost],
    disk: dict[str, int],
) -> list[dict[str, Any]]:
    """before: what quantize does first; disk: bytes that each stage leaves there."""
    steps, drawn = (len(_timesteps(c, shapes)) for c in (config, request.sampling))
    call = activations.meter(config, shapes, quantized, macs, steps)
    weights, slower = call.weights, SIMULATION
    if backend == "int8":
        parts = 2 if onednn.saturates() and config.quantization.weights.bits > 7 else 1
        weights = parts * call.weights / 4
        slower = parts * NARROW_INTEGERS if onednn.saturates() else INTEGERS
    held = memory.resident(shapes, DTYPES[config.model.dtype])
    own = memory.mapped(shapes)
    rest = memory.resident(shapes, DTYPES[request.sampling.model.dtype], DENOISERS)
    pages = own - memory.mapped(shapes, DENOISERS)
    rest += pages  # a file stays while one tensor of it is used
    others = [activations.at_size(call, one) for one in shapes.sized.values()]
    copies = activations.copies(request.sampling, shapes)
    drawing = replace(call, copies=copies, steps=drawn)
    decoder, batch = activations.first_stage(shapes), min(request.count, batch_size)
    costs = {
        "calibrate": calibrate.costs(config, shapes.denoiser, shapes.classes, call, others),
        "quantize": before | quantize.costs(config, shapes.denoiser, call),
        "sample": sample.costs(drawing, decoder, request.count, batch, slower=slower),
    }
    phases = {
        "calibrate": memory.calibrate_phases(shapes, held, sizes, costs["calibrate"]),
        "quantize": memory.quantize_phases(shapes, held, sizes, costs["quantize"]),
        "sample": memory.sample_phases(shapes, rest, sizes, weights, costs["sample"]),
    }
    rates = measured_rates(config.model.dtype, request.clock)
    kept = partial_bytes(config, shapes, steps, costs, disk)
    started = request.imports + round(memory.KERNELS)
    stages = []
    for name, found in phases.items():
        highest = max(found, key=lambda phase: found[phase])
        needed = {p: size - (p != memory.LOADING) * own for p, size in found.items()}
        neediest = max(needed, key=lambda phase: needed[phase])
        there = max((size for phase, size in found.items() if phase != memory.LOADING), default=0)
        there -= pages if name == "sample" else 0  # a file's pages lie in main memory alone
        stages.append(
            {
                "stage": name,
                "peak_bytes": started + round(found[highest]),
                "at": highest,
                "mapped_bytes": own,
                "needed_bytes": started + round(needed[neediest]),
                "needed_at": neediest,
                "device_bytes": round(there),
                "phases": {phase: started + round(size) for phase, size in found.items()},
                "macs": round(sum(c.macs + c.model_macs for c in costs[name].values())),
                "seconds": rates.seconds(costs[name].values()),
                "parts": {part: rates.seconds([cost]) for part, cost in costs[name].items()},
                "partial_bytes": kept[name],
                "disk_bytes": disk[name] + kept[name] + sum(c.disk for c in costs[name].values()),
            }
        )
    return stages


def _problems(
    request: Request, stages: list[dict[str, Any]], available: dict[str, int | None]
) -> list[str]:
    stages = [stage for stage in stages if stage["stage"] in request.stages]
    room, free = available["memory"], available["disk"]
    highest = max(stages, key=lambda stage: stage["needed_bytes"])
    disk = sum(stage["disk_bytes"] for stage in stages)
    problems = []
    if room is not None and highest["needed_bytes"] > room:
        problems.append(
            f"{highest['stage']} takes about {megabytes(highest['needed_bytes'])} of memory "
            f"({highest['needed_at']}), {megabytes(room)} are available"
        )
    largest, there = max(stages, key=lambda stage: stage["device_bytes"]), available["device"]
    if there is not None and largest["device_bytes"] > there:
        problems.append(
            f"{largest['stage']} takes up to {megabytes(largest['device_bytes'])} on "
            f"{request.device}, {megabytes(there)} are free there"
        )
    if free is not None and disk > free:
        problems.append(f"up to {megabytes(disk)} of disk are needed, {megabytes(free)} are free")
    return problems
