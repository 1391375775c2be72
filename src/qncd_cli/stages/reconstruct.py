"""Part of stage 2: weight rounding learnt by gradient descent, per layer or per block.

adaround: every layer for itself, min ||f(x^, W^) - f(x, W)||^2, x from the full-precision model,
x^ the same x smoothed and quantized (Nagel et al., arXiv 2004.10568, eq. 21 and 25).
brecq: the layers of a residual or transformer block together, so that the block's output comes
close to the full-precision model's; its inputs come from the quantized model, earlier blocks
already learnt, and activations are quantized while learning (Li et al., arXiv 2102.05426,
algorithm 1, with plain squared error in place of the Fisher weights, as Q-Diffusion does).

A block keeps what it learnt only if its output error on held-out trajectories went down.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifacts import Artifact
from ..backends.reference import forget_weight, simulate_with
from ..config import Config, WeightsConfig
from ..models.loading import DiffusionModel
from ..models.topology import reconstruction_blocks, weight_layers
from ..quant.adaround import SoftRounding, undecided
from ..quant.affine import QParams
from ..quant.layers import QuantizedLayer
from ..quant.packing import pack, unpack
from ..quant.smoothing import fold
from ..spec import FLOAT_BITS, weight_spec
from .assemble import Denoiser, Track, full_denoiser, quantized_denoiser, timestep_group
from .block_calls import BlockCalls, CalibrationRows, record

CACHE_BYTES = 2 << 30
"""Disk for the full-precision calls of several blocks; more blocks take more passes."""
JUDGED_AT_ONCE = 64
"""Samples of one call that only measures the error."""
LOGIT_TRAVEL = 6.0
"""Learning rate of the logits times the iterations: about how far Adam can move one. From the
start to the same share of the other code it is 3.2; not searched systematically."""
BIAS_RATE = 1e-3
SCALE_RATE = 1e-3
"""Learning rates of Adam: biases relative to their RMS; logarithms of input scales."""
REGULARISER = 0.5
"""Share of the curvature (see _curvature) that the regulariser takes away; 1 would take all. Tried
on a few blocks of the packaged model, not searched systematically."""


class LearntLayer(nn.Module):
    """What is learnt of one quantized layer; its compute takes the place of the backend's."""

    def __init__(self, layer: QuantizedLayer, weight: Tensor, settings: WeightsConfig):
        """weight: the full-precision one with the smoothing folded in."""
        super().__init__()
        zero_point = layer.weight_zero_point
        if zero_point is None:
            zero_point = torch.zeros_like(layer.weight_scale)
        qparams = QParams(layer.weight_scale, zero_point.to(torch.int32))
        codes = unpack(layer.weight, layer.weight_bits, layer.weight_shape)
        self.rounding = SoftRounding(weight, codes, qparams, weight_spec(layer.weight_bits))
        self.bias_shift: nn.Parameter | None = None
        self.log_factor: nn.Parameter | None = None
        if settings.learn_bias and layer.bias is not None:
            self.bias_shift = nn.Parameter(torch.zeros_like(layer.bias))
            self.bias_unit = float(layer.bias.square().mean().sqrt().clamp(min=1e-3))
        if settings.learn_input_scale and layer.input_spec is not None:
            self.log_factor = nn.Parameter(torch.zeros_like(layer.input_scale))
        self.up_share = self.rounding.up_share()

    def bias(self, layer: QuantizedLayer) -> Tensor | None:
        if layer.bias is None or self.bias_shift is None:
            return layer.bias
        return layer.bias + self.bias_unit * self.bias_shift

    def compute(self, layer: QuantizedLayer, x: Tensor) -> Tensor:
        """The layer with its soft weight."""
        qparams = None if layer.input_spec is None else layer.input_qparams()
        if qparams is not None and self.log_factor is not None:
            factor = self.log_factor[layer.step.group].exp()
            qparams = qparams._replace(scale=qparams.scale * factor)
        weight = self.rounding.soft_weight(self.up_share)
        return simulate_with(layer, x, weight, self.bias(layer), qparams)

    def harden(self, layer: QuantizedLayer) -> dict[str, Tensor]:
        """The buffers of the layer as they were learnt, under the artifact's names."""
        state = {"weight": pack(self.rounding.codes(), layer.weight_bits)}
        bias = self.bias(layer)
        if bias is not None:
            state["bias"] = bias.detach()
        if self.log_factor is not None:
            state["input_scale"] = layer.input_scale * self.log_factor.detach().exp()
        return state


@dataclass(frozen=True)
class Block:
    """A module of the quantized denoiser to be learnt, and what it is to compute.

    calls: its arguments; targets: outputs of the full-precision block; weights: full-precision
    weights of its layers, smoothing folded in; group: of every sample's timestep, [K].
    """

    module: nn.Module
    layers: dict[str, QuantizedLayer]
    weights: dict[str, Tensor]
    calls: BlockCalls
    targets: BlockCalls
    group: Tensor
    device: torch.device

    def squared_error(self, samples: Tensor) -> Tensor:
        """Mean of (block - target)^2 over the samples, which share a timestep group. []"""
        for layer in self.layers.values():
            layer.step.group = int(self.group[samples[0]])
        args, kwargs = self.calls.arguments(samples, self.device)
        output = self.module(*args, **kwargs)
        return (output - self.targets.output(samples, self.device)).square().mean()

    def in_groups(self, samples: Tensor, size: int) -> Iterator[Tensor]:
        """The samples in parts of at most size, each of one timestep group."""
        for group in self.group[samples].unique():
            yield from samples[self.group[samples] == group].split(size)

    @torch.no_grad()
    def mean_error(self, samples: Tensor) -> float:
        parts = self.in_groups(samples, JUDGED_AT_ONCE)
        return sum(float(self.squared_error(p).double() * len(p)) for p in parts) / len(samples)

    def mean_power(self, samples: Tensor) -> float:
        parts = samples.split(JUDGED_AT_ONCE)
        return sum(
            float(self.targets.output(p, self.device).square().mean().double() * len(p))
            for p in parts
        ) / len(samples)


def reconstruct(
    config: Config, model: DiffusionModel, calibration: Artifact, start: Artifact, track: Track
) -> Artifact:
    """The artifact with codes (as configured, biases and input scales too) that were learnt.

    start: a complete quantized artifact, sealed or not. Entries of its layers get a key
    `reconstruction`: block, relative_output_error_{before, after} of the block on held-out
    trajectories, and whether the result was kept. Deterministic for equal inputs.
    """
    settings = config.quantization.weights
    simulated = quantized_denoiser(model, start, "simulate", cache_time_embeddings=False)
    student = Denoiser(simulated.module.float(), simulated.step, simulated.group_bounds)
    teacher = full_denoiser(model)
    names = [n for n, e in start.body["layers"].items() if e["weight_bits"] != FLOAT_BITS]
    grouped = {name: [name] for name in names}
    if settings.rounding == "brecq":
        grouped = reconstruction_blocks(model.denoiser, names)
    rows = CalibrationRows(config, model, calibration, settings.reconstruction_rows)
    group = torch.tensor([timestep_group(t, student.group_bounds) for t in rows.timestep.tolist()])
    tensors, entries = dict(start.tensors), dict(start.body["layers"])
    with tempfile.TemporaryDirectory(prefix="qncd-reconstruct-") as name:
        pairs = recorded_blocks(rows, teacher, student, grouped, Path(name), settings.rounding)
        for block_name, calls, targets in track(pairs, "learning the rounding", len(grouped)):
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
            learnt, report = learn_block(block, settings, rows.held_out, config.calibration.seed)
            for n in layers:
                entries[n] = {**entries[n], "reconstruction": {"block": block_name, **report}}
                if report["kept"]:
                    entries[n]["rounding"] = settings.rounding
                    tensors |= {f"{n}.{key}": value for key, value in learnt[n].items()}
    return replace(start, tensors=tensors, body={**start.body, "layers": entries})


def quantized_layers(module: nn.Module, names: list[str]) -> dict[str, QuantizedLayer]:
    found = {name: module.get_submodule(name) for name in names}
    return {name: layer for name, layer in found.items() if isinstance(layer, QuantizedLayer)}


def exact_weights(denoiser: nn.Module, layers: dict[str, QuantizedLayer]) -> dict[str, Tensor]:
    """The full-precision weights of the layers with their smoothing folded in, float32."""
    originals = weight_layers(denoiser)
    weights = {name: originals[name].weight.detach().float() for name in layers}
    factors = {name: layer.smoothing for name, layer in layers.items()}
    return {n: w if (f := factors[n]) is None else fold(w, f) for n, w in weights.items()}


def recorded_blocks(
    rows: CalibrationRows,
    teacher: Denoiser,
    student: Denoiser,
    grouped: dict[str, list[str]],
    folder: Path,
    method: str,
) -> Iterator[tuple[str, BlockCalls, BlockCalls]]:
    """(name, arguments, targets) of every block in the order of execution.

    The arguments of a brecq block are recorded when it is its turn: they depend on what was
    learnt before.
    """
    first = rows.batches[0][:1]
    probe = record(rows, teacher, grouped, folder, arguments=True, output=True, batches=[first])
    size = {}
    for name, calls in probe.items():
        size[name] = sum(c.nbytes for c in calls.columns.values()) // calls.samples * len(rows)
        calls.delete()
    alone = method == "adaround"
    for part in _parts(size):
        found = record(rows, teacher, part, folder, arguments=alone, output=True)
        for name in part:
            targets = calls = found[name]
            if not alone:
                recorded = record(rows, student, [name], folder, arguments=True, output=False)
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


# ------------------------------------------------------------------ learning


def learn_block(
    block: Block, settings: WeightsConfig, held_out: Tensor, seed: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Learn the rounding of a block's layers; leaves the better of start and result in them.

    held_out: [K] bool, samples that judge and do not teach. Returns the layers' learnt tensors by
    name, and a report: relative_output_error_{before, after} on the held-out samples, kept.
    """
    indices = torch.arange(len(held_out))
    judges, teaching = indices[held_out], indices[~held_out]
    power = max(block.mean_power(judges), 1e-30)
    before = block.mean_error(judges)
    unit = block.mean_error(teaching)
    learnt: dict[str, dict[str, Tensor]] = {}
    after = before
    if unit > 0:
        start = {n: _buffers(layer) for n, layer in block.layers.items()}
        learnt = _descend(block, settings, teaching, unit, seed)
        _load(block.layers, learnt)
        after = block.mean_error(judges)
        if not after < before:
            _load(block.layers, start)
    return learnt, {
        "relative_output_error_before": before / power,
        "relative_output_error_after": min(after, before) / power,
        "kept": after < before,
    }


def _buffers(layer: QuantizedLayer) -> dict[str, Tensor]:
    return {n: b for n, b in layer.named_buffers() if n in ("weight", "bias", "input_scale")}


def _load(layers: dict[str, QuantizedLayer], states: dict[str, dict[str, Tensor]]) -> None:
    for name, layer in layers.items():
        for key, value in states[name].items():
            setattr(layer, key, value)
        forget_weight(layer)


def _descend(
    block: Block, settings: WeightsConfig, teaching: Tensor, unit: float, seed: int
) -> dict[str, dict[str, Tensor]]:
    """Adam on error / unit + regulariser; unit: the error at the start. Returns the hard results.

    The layers compute with their soft weights meanwhile and as before afterwards.
    """
    generator = torch.Generator().manual_seed(seed)
    learners = {
        name: LearntLayer(layer, block.weights[name], settings)
        for name, layer in block.layers.items()
    }
    rate = LOGIT_TRAVEL / settings.iterations
    rates = {"logits": rate, "bias_shift": BIAS_RATE, "log_factor": SCALE_RATE}
    optimizer = torch.optim.Adam(
        [
            {"params": [p], "lr": rates[name.rpartition(".")[2]]}
            for learner in learners.values()
            for name, p in learner.named_parameters()
        ]
    )
    computes = {name: layer.compute for name, layer in block.layers.items()}
    try:
        for name, layer in block.layers.items():
            layer.compute = learners[name].compute
        strength = _curvature(block, learners, teaching, generator)
        for _ in range(settings.iterations):
            samples = _draw(block.group, teaching, settings.reconstruction_batch, generator)
            with torch.enable_grad():
                for learner in learners.values():
                    learner.up_share = learner.rounding.up_share()
                loss = block.squared_error(samples) / unit
                for name, learner in learners.items():
                    share = learner.up_share
                    force = REGULARISER * strength[name] / unit / share.numel()
                    loss = loss + force * undecided(share)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
    finally:
        for name, layer in block.layers.items():
            layer.compute = computes[name]
    return {name: learners[name].harden(layer) for name, layer in block.layers.items()}


def _curvature(
    block: Block, learners: dict[str, LearntLayer], samples: Tensor, generator: torch.Generator
) -> dict[str, float]:
    """Per layer, what the error rises by when every h moves by 1/2 in a random direction.

    For an error that is quadratic in h with second derivatives c_i that is sum c_i / 8, and with
    this weight the mean of 4h(1 - h) just cancels the mean curvature: a weight then changes its
    code where the discrete change lowers the error, not wherever the gradient points.
    """
    some = samples[:: max(1, len(samples) // JUDGED_AT_ONCE)]
    for learner in learners.values():
        learner.up_share = learner.rounding.decided()
    here = block.mean_error(some)
    rise = {}
    for name, learner in learners.items():
        decided = learner.up_share
        signs = torch.randint(0, 2, decided.shape, generator=generator).to(decided)
        errors = []
        for step in (signs - 0.5, 0.5 - signs):  # both ways: the slope cancels
            learner.up_share = decided + step
            errors.append(block.mean_error(some))
        learner.up_share = decided
        rise[name] = max(0.0, sum(errors) / 2 - here)
    return rise


def _draw(group: Tensor, samples: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """At most size of the samples at random, all of the timestep group of the first one drawn."""
    order = samples[torch.randperm(len(samples), generator=generator)]
    return order[group[order] == group[order[0]]][:size]
