"""A quantized model whose weights have changed in places: those layers alone are rounded again.

Everything that was decided about the others holds: bits, smoothing factors, ranges, codes. Hessians
of the layers in question are collected anew, of the inputs that they have now: kept, those of
Stable Diffusion 1.x would take 28 GB, and be of the inputs that they had.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..config.schema import Config
from ..errors import ConfigError
from ..machine import give_back
from ..metrics.tensor import sqnr_db
from ..models.loading import DiffusionModel
from ..models.topology import weight_layers
from ..progress import Track, no_progress
from ..ptq import noise
from ..ptq.coverage import coverage
from ..ptq.hessians import SUMS, collect_hessians, hessian_groups, wanted_rows
from ..ptq.job import QuantizationJob
from ..ptq.layer import LAYER, quantized_layer
from ..ptq.layer_plan import LayerPlan, plan_layers
from ..ptq.smoothing_choice import factors_of
from ..quant.affine import QParams
from ..quant.gptq import Curvature
from ..runtime.denoiser import denoiser_costs, full_denoiser, guided_predict, quantized_denoiser
from ..spec import FLOAT_BITS
from ..store.artifacts import Artifact, seal, tensors_by_module
from ..store.layer_entry import LayerEntry, bodies, layer_entries
from ..store.partial import NOTHING_KEPT, Partial, Piece

ROUNDINGS = ("nearest", "gptq")
"""Those that round a layer by itself; learnt ones look at the block around it."""
LOSS_STEPS, LOSS_ROWS = 5, 2
"""Steps of the sampler and calibration rows at each of them that the loss is measured on."""


@dataclass(frozen=True)
class Requantized:
    """Artifacts of the changed model. layers: rounded again; sqnr_db: of its predictions to those
    of full precision, on calibration inputs."""

    smoothing: Artifact
    calibration: Artifact
    quantized: Artifact
    noise_stats: Artifact
    coverage: dict[str, Any]
    layers: tuple[str, ...]
    sqnr_db: float


def layer_digests(denoiser: nn.Module) -> dict[str, str]:
    """A digest of every layer's weight and bias."""
    found = {}
    for name, layer in weight_layers(denoiser).items():
        digest = hashlib.sha256()
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
                digest.update(flat.numpy().data)
        found[name] = digest.hexdigest()
    return found


def check(config: Config, quantized: Artifact) -> None:
    """Raises ConfigError for settings under which layers cannot be rounded one by one."""
    q = config.quantization
    if q.weights.rounding not in ROUNDINGS:
        raise ConfigError(
            f"rounding {q.weights.rounding} is learnt by the block, not layer by layer",
            "quantize the model with the LoRA from the start: qncd run --lora",
        )
    if q.weights.passes > 1 or q.weights.asymmetry > 0 or q.bias_correction:
        raise ConfigError(
            "weights.passes, weights.asymmetry and bias_correction look beyond a layer's weight",
            "quantize the model with the LoRA from the start: qncd run --lora",
        )


def run(
    config: Config,
    model: DiffusionModel,
    artifacts: Mapping[str, Artifact],
    before: Mapping[str, str],
    track: Track = no_progress,
    partial: Partial = NOTHING_KEPT,
) -> Requantized:
    """The artifacts of the model as it is now.

    config: of the model as it is now, like that of the artifacts in all else. artifacts: smoothing,
    calibration, quantized and noise_stats of the model as it was; before: layer_digests of it.
    partial: what an earlier process has done. Noise is measured anew where a correction is
    configured that uses it. Raises ConfigError.
    """
    old = artifacts["quantized"]
    check(config, old)
    now, entries = layer_digests(model.denoiser), layer_entries(old.body)
    changed = [name for name in entries if now.get(name) != before.get(name)]
    origin = {"model": old.model, "quantized": old.digest}
    smoothing = _sealed_for(artifacts["smoothing"], config, model, {}, origin)
    parents = {"smoothing": smoothing.digest}
    calibration = _sealed_for(artifacts["calibration"], config, model, parents, origin)
    plans = [
        replace(
            plan,
            weight_bits=entries[plan.name].weight_bits,
            activation_bits=entries[plan.name].activation_bits,
            observer=entries[plan.name].observer,
        )
        for plan in plan_layers(config, model.denoiser)
        if plan.name in changed
    ]
    job = QuantizationJob(config, model, calibration, plans, factors_of(smoothing), partial)
    tensors, made = dict(old.tensors), dict(entries)
    for name, piece in _rounded(job, old, track):
        for key in [key for key in tensors if key.rpartition(".")[0] == name]:
            del tensors[key]
        tensors |= {f"{name}.{key}": value for key, value in piece.tensors.items()}
        made[name] = replace(
            LayerEntry.from_body(piece.value),
            sensitivity=entries[name].sensitivity,
            estimated_error=entries[name].estimated_error,
        )
    body = {
        **old.body,
        "layers": bodies(made),
        "source": model.source,
        "requantized": {**origin, "layers": changed},
    }
    parents = {"calibration": calibration.digest, "smoothing": smoothing.digest}
    digest = config.stage_digest("quantize")
    quantized = seal(Artifact("quantized", tensors, body, digest, model.digest, parents))
    if config.correction.inter.method == "none":
        stats = artifacts["noise_stats"]
        stats_body = {**stats.body, noise.CARRIED: old.digest}
        parents = {"quantized": quantized.digest}
        carried = replace(stats, body=stats_body, config=digest, parents=parents)
        stats = seal(replace(carried, model=model.digest))
    else:
        stats = seal(noise.measure_noise(config, model, quantized, track, partial))
    return Requantized(
        smoothing,
        calibration,
        quantized,
        stats,
        coverage(config, model, quantized),
        tuple(changed),
        loss(config, model, quantized, calibration),
    )


def _sealed_for(
    artifact: Artifact,
    config: Config,
    model: DiffusionModel,
    parents: dict[str, str],
    origin: Mapping[str, str],
) -> Artifact:
    """What calibrate found of the model as it was, for the model as it is now, which it says."""
    body = {**artifact.body, "calibrated_on": dict(origin)}
    digest = config.stage_digest("calibrate")
    return seal(replace(artifact, body=body, config=digest, model=model.digest, parents=parents))


def _rounded(job: QuantizationJob, old: Artifact, track: Track) -> Iterator[tuple[str, Piece]]:
    """Name, and tensors and entry as in the artifact, of every layer of the job, with the input
    ranges that it had."""
    stored = tensors_by_module(old.tensors)
    qparams: dict[str, QParams | None] = {}
    for plan in job.plans:
        scale = stored[plan.name].get("input_scale")
        qparams[plan.name] = (
            None if scale is None else QParams(scale, stored[plan.name]["input_zero_point"])
        )
    gptq = job.config.quantization.weights.rounding == "gptq"
    wanted = [p for p in job.plans if gptq and p.weight_bits != FLOAT_BITS]
    rows = rows_a_call(job.config, job.model, wanted) if wanted else 0
    few = replace(job, config=_with_batch(job.config, rows))
    for group in hessian_groups(wanted):
        left = []
        for plan in group:
            piece = job.partial.take(f"{LAYER}{plan.name}")
            if piece is None:
                left.append(plan)
            else:
                yield plan.name, piece
        if not left:
            continue
        found = collect_hessians(few.planned(left), qparams, track)
        for plan in track(left, "rounding weights", len(left), "layers"):
            piece = _layer(job, plan, qparams[plan.name], found.pop(plan.name))
            job.partial.keep(f"{LAYER}{plan.name}", piece)
            yield plan.name, piece
        job.partial.forget(SUMS)
    for plan in job.plans:
        if plan not in wanted:
            yield plan.name, _layer(job, plan, qparams[plan.name], None)


def _layer(
    job: QuantizationJob, plan: LayerPlan, qparams: QParams | None, curvature: Curvature | None
) -> Piece:
    piece = quantized_layer(job, plan, qparams, curvature, {})
    give_back()
    return piece


def rows_a_call(config: Config, model: DiffusionModel, plans: Sequence[LayerPlan]) -> int:
    """Calibration rows in a call that are enough for every Hessian, no more than a batch.

    A layer that sees one vector of a sample needs all of them; one that sees the features of an
    image has enough in a few.
    """
    positions = {c.name: c.macs for c in denoiser_costs(config, model)}
    copies = 2 if model.guides(config.sampling.guidance_scale) else 1
    batch = min(config.calibration.batch_size, config.calibration.trajectories)
    calls = min(config.calibration.looks.hessian_calls, config.sampling.steps)
    needed = 1
    for plan in plans:
        vectors = max(1, positions.get(plan.name, 0) // plan.layer.weight.numel())
        needed = max(
            needed,
            math.ceil(wanted_rows(plan, config.calibration.looks) / (calls * copies * vectors)),
        )
    return min(needed, batch)


def _with_batch(config: Config, rows: int) -> Config:
    calibration = config.calibration.model_copy(update={"batch_size": max(1, rows)})
    return config.model_copy(update={"calibration": calibration})


def loss(
    config: Config, model: DiffusionModel, quantized: Artifact, calibration: Artifact
) -> float:
    """SQNR in dB of guided predictions to full precision's, both of the model as it is now."""
    rows = calibration.tensors
    times = sorted(set(rows["inputs.timestep"].tolist()), reverse=True)
    times = times[:: math.ceil(len(times) / LOSS_STEPS)]
    cache = quantized.body["cache_time_embeddings"]
    denoisers = full_denoiser(model), quantized_denoiser(model, quantized, "simulate", cache)
    found: list[list[torch.Tensor]] = [[], []]
    for t in times:
        picked = (rows["inputs.timestep"] == t).nonzero().flatten()[:LOSS_ROWS]
        for predictions, denoiser in zip(found, denoisers, strict=True):
            labels, scale = rows["inputs.class"][picked], config.sampling.guidance_scale
            predict = guided_predict(model, denoiser, labels, scale)
            predictions.append(predict(rows["inputs.x"][picked], torch.tensor(t)))
    return sqnr_db(*(torch.cat(predictions) for predictions in found))
