"""Reconstruction: weight rounding learnt by gradient descent, per layer or per block.

adaround: every layer for itself, min ||f(x^, W^) - f(x, W)||^2, x from the full-precision model,
x^ the same x smoothed and quantized (Nagel et al., arXiv 2004.10568, eq. 21 and 25).
brecq: the layers of a residual or transformer block together, so that the block's output comes
close to the full-precision model's; its inputs come from the quantized model, earlier blocks
already learnt, and activations are quantized while learning (Li et al., arXiv 2102.05426,
algorithm 1, with plain squared error in place of the Fisher weights, as Q-Diffusion does).

A block keeps what it learnt only if its output error on held-out trajectories went down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..models.topology import reconstruction_blocks, weight_layers
from ..progress import Track, counted
from ..quant.layers import QuantizedLayer
from ..runtime.denoiser import Denoiser, full_denoiser, quantized_denoiser, timestep_group
from ..spec import FLOAT_BITS
from ..store.artifacts import Artifact, tensors_by_module
from ..store.layer_entry import Reconstruction, bodies, layer_entries
from ..store.partial import Piece
from .block_calls import BlockCalls, CalibrationRows, record
from .cost import Cost, DenoiserCall
from .job import QuantizationJob
from .layer_plan import LayerPlan
from .learn_block import JUDGED_AT_ONCE, Block, Learnt, learn_block, load

CACHE_BYTES = 2 << 30
"""Disk for the full-precision calls of several blocks; more blocks take more passes."""
LEARNING_WEIGHTS = 10
"""Float32 copies of a weight while its rounding is learnt: weight, codes, logits, their gradient,
Adam's two moments and the soft weight's parts."""
LEARNING_PASSES = 3
"""Forward and backward, of one gradient step."""
BLOCK = "block "
"""Beginning of a name in partial results; that of the block follows."""


def reconstruct(job: QuantizationJob, start: Artifact, track: Track) -> Artifact:
    """The artifact with codes (as configured, biases and input scales too) that were learnt.

    start: a complete quantized artifact, sealed or not. Entries of its layers get a key
    `reconstruction`: block, relative_output_error_{before, after} of the block on held-out
    trajectories, and whether the result was kept. Deterministic for equal inputs.
    """
    config, model = job.config, job.model
    settings = config.quantization.weights
    simulated = quantized_denoiser(model, start, "simulate", cache_time_embeddings=False)
    student = Denoiser(simulated.module.float(), simulated.step, simulated.group_bounds)
    teacher = full_denoiser(model)
    entries = layer_entries(start.body)
    names = [n for n, entry in entries.items() if entry.weight_bits != FLOAT_BITS]
    grouped = learnt_together(settings.rounding, model.denoiser, names)
    rows = CalibrationRows(config, model, job.calibration, settings.reconstruction_rows)
    group = torch.tensor([timestep_group(t, student.group_bounds) for t in rows.timestep.tolist()])
    tensors = dict(start.tensors)
    done = {n: found for n in grouped if (found := job.partial.take(f"{BLOCK}{n}")) is not None}
    for name, piece in done.items():
        if Learnt(*piece.value).kept:
            learnt = {n: t.to(model.device) for n, t in piece.tensors.items()}
            load(quantized_layers(student.module, grouped[name]), tensors_by_module(learnt))
    todo = {name: layers for name, layers in grouped.items() if name not in done}
    with job.partial.scratch() as folder:
        pairs = recorded_blocks(rows, teacher, student, todo, folder, settings.rounding, track)
        total = len(todo) * settings.iterations
        learning = counted(track, pairs, "learning the rounding", total, "iterations")
        for (block_name, calls, targets), tick in learning:
            layers = quantized_layers(student.module, grouped[block_name])
            block = Block(
                student.module.get_submodule(block_name),
                layers,
                exact_weights(model.denoiser, layers),
                calls,
                targets,
                group,
                model.device,
            )
            states, report = learn_block(
                block, settings, rows.held_out, config.calibration.seed, tick
            )
            new = states if report.kept else {}
            done[block_name] = Piece(
                [*report], {f"{n}.{key}": t for n, state in new.items() for key, t in state.items()}
            )
            job.partial.keep(f"{BLOCK}{block_name}", done[block_name])
    for block_name, piece in done.items():
        report = Learnt(*piece.value)
        tensors |= piece.tensors
        for n in grouped[block_name]:
            rounding = settings.rounding if report.kept else entries[n].rounding
            reconstruction = Reconstruction(block_name, *report)
            entries[n] = replace(entries[n], reconstruction=reconstruction, rounding=rounding)
    return replace(start, tensors=tensors, body={**start.body, "layers": bodies(entries)})


def learnt_together(rounding: str, denoiser: nn.Module, names: list[str]) -> dict[str, list[str]]:
    """Layers by the block in which they are learnt."""
    if rounding == "brecq":
        return reconstruction_blocks(denoiser, names)
    return {name: [name] for name in names}


def quantized_layers(module: nn.Module, names: list[str]) -> dict[str, QuantizedLayer]:
    found = {name: module.get_submodule(name) for name in names}
    return {name: layer for name, layer in found.items() if isinstance(layer, QuantizedLayer)}


def exact_weights(denoiser: nn.Module, layers: dict[str, QuantizedLayer]) -> dict[str, Tensor]:
    """The full-precision weights of the layers with their smoothing folded in, float32."""
    originals = weight_layers(denoiser)
    weights = {name: originals[name].weight.detach().float() for name in layers}
    return {name: layers[name].factor.fold(weight) for name, weight in weights.items()}


def recorded_blocks(
    rows: CalibrationRows,
    teacher: Denoiser,
    student: Denoiser,
    grouped: dict[str, list[str]],
    folder: Path,
    method: str,
    track: Track,
) -> Iterator[tuple[str, BlockCalls, BlockCalls]]:
    """(name, arguments, targets) of every block in the order of execution.

    The arguments of a brecq block are recorded when it is its turn: they depend on what was
    learnt before.
    """
    if not grouped:
        return
    first = rows.batches[0][:1]
    probe = record(rows, teacher, grouped, folder, arguments=True, output=True, batches=[first])
    size = {}
    for name, calls in probe.items():
        size[name] = sum(c.nbytes for c in calls.columns.values()) // calls.samples * len(rows)
        calls.delete()
    alone = method == "adaround"
    for part in _parts(size):
        found = record(rows, teacher, part, folder, arguments=alone, output=True, track=track)
        for name in part:
            targets = calls = found[name]
            if not alone:
                recorded = record(
                    rows, student, [name], folder, arguments=True, output=False, track=track
                )
                calls = recorded[name]
            yield name, calls, targets
            calls.delete()
            targets.delete()


def _parts(size: dict[str, int]) -> Iterator[list[str]]:
    """Consecutive names whose sizes sum up to at most CACHE_BYTES (at least one name)."""
    part: list[str] = []
    used = 0
    for name, bytes_ in size.items():
        if part and used + bytes_ > CACHE_BYTES:
            yield part
            part, used = [], 0
        part.append(name)
        used += bytes_
    if part:
        yield part


def cost(config: Config, denoiser: nn.Module, plans: list[LayerPlan], call: DenoiserCall) -> Cost:
    """Gradient steps over every block, the largest of them held. plans: of quantized weights."""
    calibration, weights = config.calibration, config.quantization.weights
    sizes = {p.name: p.layer.weight.numel() for p in plans}
    grouped = learnt_together(weights.rounding, denoiser, list(sizes))
    block = max((sum(sizes[n] for n in names) for names in grouped.values()), default=0)
    batch = call.copies * min(calibration.batch_size, calibration.trajectories)
    rows = max(batch, JUDGED_AT_ONCE)
    samples = weights.iterations * weights.reconstruction_batch
    return Cost(
        call.weights + LEARNING_WEIGHTS * 4.0 * block + rows * call.simulated,
        LEARNING_PASSES * samples * call.macs,
        disk=CACHE_BYTES,
    )
