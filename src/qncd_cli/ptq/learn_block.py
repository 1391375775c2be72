"""Learning one block: its rounding, by gradient descent (see reconstruct).

The squared error of the block's output and a regulariser that drives every weight to one of its
two codes (Nagel et al., arXiv 2004.10568, eq. 21 to 25); Adam.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backends.reference import forget_weight, simulate_with
from ..config.quantization import WeightsConfig
from ..progress import Tick
from ..quant.adaround import SoftRounding, undecided
from ..quant.affine import QParams
from ..quant.layers import QuantizedLayer
from ..quant.packing import pack, unpack
from ..spec import weight_spec
from .block_calls import BlockCalls

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


class Learnt(NamedTuple):
    """Errors of a block's output on held-out samples, relative to the output's power, and whether
    what was learnt stayed."""

    before: float
    after: float
    kept: bool


def learn_block(
    block: Block, settings: WeightsConfig, held_out: Tensor, seed: int, tick: Tick
) -> tuple[dict[str, dict[str, Tensor]], Learnt]:
    """Learn the rounding of a block's layers; leaves the better of start and result in them.

    held_out: [K] bool, samples that judge and do not teach; tick: called at every iteration.
    Returns the layers' learnt tensors by name, and a report.
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
        learnt = _descend(block, settings, teaching, unit, seed, tick)
        load(block.layers, learnt)
        after = block.mean_error(judges)
        if not after < before:
            load(block.layers, start)
    return learnt, Learnt(before / power, min(after, before) / power, after < before)


def _buffers(layer: QuantizedLayer) -> dict[str, Tensor]:
    return {n: b for n, b in layer.named_buffers() if n in ("weight", "bias", "input_scale")}


def load(layers: dict[str, QuantizedLayer], states: dict[str, dict[str, Tensor]]) -> None:
    """Give layers the buffers that were learnt, by layer and by the artifact's names."""
    for name, layer in layers.items():
        for key, value in states[name].items():
            setattr(layer, key, value)
        forget_weight(layer)


def _descend(
    block: Block, settings: WeightsConfig, teaching: Tensor, unit: float, seed: int, tick: Tick
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
            tick()
    finally:
        for name, layer in block.layers.items():
            layer.compute = computes[name]
    return {name: learners[name].harden(layer) for name, layer in block.layers.items()}


def _curvature(
    block: Block, learners: dict[str, LearntLayer], samples: Tensor, generator: torch.Generator
) -> dict[str, float]:
    """Per layer, the rise of the error when every h moves by 1/2 in a random direction.

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
