"""The error of a layer: what quantization does to its output, for a choice of smoothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config.schema import Config
from ..quant.affine import QParams, choose_qparams, fake_quantize
from ..quant.gptq import conditional_variances, input_vectors
from ..quant.observers import RangeObserver, choose_range
from ..quant.rounding import weight_qparams
from ..quant.smoothing import SmoothingFactor
from ..runtime.denoiser import timestep_group
from ..spec import FLOAT_BITS, activation_spec, weight_spec
from .layer_plan import LayerPlan, range_observer
from .probes import Probe

HESSIAN_ROWS = 4096
STEADY_WEIGHT = 10.0
"""How often the weight's part counts: it is the same at every step and adds up over a trajectory,
while rounding the inputs averages out. Counted once, factors that move error from the inputs to the
weight look good here and are worse on the images."""


class LayerError:
    """Relative squared error of one layer's output on a probe, by smoothing factor, the part that
    the weight makes counted STEADY_WEIGHT times.

    Error of the activations: measured, with ranges per timestep group chosen by the layer's own
    observer (min-max where that is `output`). Error of the weights: measured where rounding is
    nearest; predicted where GPTQ follows: rounding column i to a scale D_o leaves D_o^2 / 12
    times the variance of input i given the inputs that are rounded after it (GPTQ is Babai's
    nearest plane; arXiv 2507.18553), which a factor S divides by S_i^2.
    """

    def __init__(self, config: Config, plan: LayerPlan, probe: Probe, bounds: tuple[float, ...]):
        self.plan, self.probe, self.bounds = plan, probe, bounds
        self.percentile = config.quantization.activations.percentile
        layer = plan.layer
        self.weight = layer.weight.detach().float().cpu()
        self.power = sum(self._energy(x, self.weight) for _, x in probe.parts)
        self.predicted = config.quantization.weights.rounding != "nearest" and not (
            isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.dilation != (1, 1))
        )
        self._variances: dict[bool, Tensor] = {}

    def of(self, factor: SmoothingFactor) -> float:
        """(||f(x^ - x, W)||^2 + STEADY_WEIGHT ||f(x^, W^ - W)||^2) / ||f(x, W)||^2."""
        weight = factor.fold(self.weight)
        parts = [
            (timestep_group(t, self.bounds), factor.apply(x, self.plan.channel_axis))
            for t, x in self.probe.parts
        ]
        quantized = self._quantized(parts)
        error = sum(self._energy(q - x, weight) for (_, x), q in zip(parts, quantized, strict=True))
        if self.plan.weight_bits != FLOAT_BITS:
            spec = weight_spec(self.plan.weight_bits)
            qparams = weight_qparams(weight, spec)
            if self.predicted:
                error += STEADY_WEIGHT * self._predicted_weight_error(factor, qparams)
            else:
                difference = fake_quantize(weight, qparams, spec) - weight
                energy = sum(self._energy(q, difference) for q in quantized)
                error += STEADY_WEIGHT * energy
        return float(error / max(self.power, 1e-30))

    def _quantized(self, parts: list[tuple[int, Tensor]]) -> list[Tensor]:
        if self.plan.activation_bits == FLOAT_BITS:
            return [x for _, x in parts]
        spec = activation_spec(self.plan.activation_bits)
        channels = self.plan.in_channels
        observer = RangeObserver(channels, self.plan.channel_axis, len(self.bounds) + 1)
        for group, x in parts:
            observer.update(x, group)
        chosen_by = range_observer(self.plan.observer)
        low, high = choose_range(observer.state(), chosen_by, spec, self.percentile)
        qparams = choose_qparams(low, high, spec)
        return [fake_quantize(x, qparams.at(group), spec) for group, x in parts]

    def _predicted_weight_error(self, factor: SmoothingFactor, qparams: QParams) -> float:
        shifted = factor.shift is not None
        if shifted not in self._variances:
            rows = max(1, HESSIAN_ROWS // len(self.probe.parts))
            vectors, count = [], 0
            for _, x in self.probe.parts:
                if factor.shift is not None:
                    unscaled = factor._replace(factor=torch.ones_like(factor.factor))
                    x = unscaled.apply(x, self.plan.channel_axis)
                found = input_vectors(x, self.plan.layer, rows)
                vectors.append(found)
                count += len(input_vectors(x[:1], self.plan.layer)) * len(x)
            total = torch.cat(vectors)
            hessian = total.T @ total * (count / len(total))
            self._variances[shifted] = conditional_variances(hessian)
        repeats = self.weight[0, 0].numel()
        inverse = factor.factor.double().pow(-2).expand(self.plan.in_channels)
        per_column = (self._variances[shifted] * inverse.repeat_interleave(repeats)).sum()
        return float(per_column * qparams.scale.double().square().sum() / 12)

    def _energy(self, x: Tensor, weight: Tensor) -> float:
        return float(self.plan.apply(x, weight).double().square().sum())
