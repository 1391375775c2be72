"""Activation ranges and bias corrections, judged by what they do to a layer's output."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..config.schema import Config
from ..quant.affine import QParams, choose_qparams, fake_quantize
from ..quant.observers import choose_range
from ..quant.smoothing import SmoothingFactor
from ..runtime.denoiser import timestep_group
from ..spec import activation_spec
from .cost import Cost, DenoiserCall
from .layer_plan import LayerPlan
from .probes import Probe, kept_rows
from .probes import cost as probing_cost

FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Fractions of the min-max range that are tried at either end, in all pairs."""
CLIP_WEIGHT = 4.0
"""What clipping cuts off is cut off again at every step; rounding errors average out."""


def judged_by_output(config: Config, plans: list[LayerPlan]) -> list[LayerPlan]:
    """Those whose range or bias is chosen by what becomes of the layer's output."""
    return [p for p in plans if p.observer == "output" or config.quantization.bias_correction]


class LayerOutput:
    """What quantizing one layer does to its output, on inputs of a probe.

    Inputs are smoothed by factor first; weight: the layer's own, smoothing folded in.
    """

    def __init__(
        self, plan: LayerPlan, probe: Probe, factor: SmoothingFactor, bounds: tuple[float, ...]
    ):
        self.plan = plan
        self.weight = factor.fold(plan.layer.weight.detach().float().cpu())
        self.parts: dict[int, list[Tensor]] = {}
        for t, x in probe.parts:
            smoothed = factor.apply(x, plan.channel_axis)
            self.parts.setdefault(timestep_group(t, bounds), []).append(smoothed)

    def ranges(self, state: dict[str, Tensor], percentile: float) -> tuple[Tensor, Tensor]:
        """(x_min, x_max), [G] each: per group the range with the least error of the output.

        Candidates: min-max, its fractions at either end, and the range of least squared error.
        state: of the layer's observer. A group that the probe does not hold takes min-max.
        """
        spec = activation_spec(self.plan.activation_bits)
        low, high = (x.clone() for x in choose_range(state, "minmax", spec))
        tight = choose_range(state, "mse", spec, percentile)
        for group, parts in self.parts.items():
            x = torch.cat(parts)
            ends = [(low[group] * a, high[group] * b) for a in FRACTIONS for b in FRACTIONS]
            ends.append((tight[0][group], tight[1][group]))
            if low[group] > -0.1 * high[group]:  # a short end (SiLU's): in full, or mse's
                ends = [pair for pair in ends if pair[0] <= low[group]] + ends[-1:]
            errors = [self._error(x, *pair) for pair in ends]
            low[group], high[group] = ends[errors.index(min(errors))]
        return low, high

    def _error(self, x: Tensor, low: Tensor, high: Tensor) -> float:
        spec = activation_spec(self.plan.activation_bits)
        qparams = choose_qparams(low, high, spec)
        top = (spec.qmax - qparams.zero_point) * qparams.scale
        bottom = (spec.qmin - qparams.zero_point) * qparams.scale
        inside = x.clamp(bottom, top)
        rounding = self.plan.apply(fake_quantize(x, qparams, spec) - inside, self.weight)
        error = rounding.double().square().sum()
        if not torch.equal(inside, x):
            error += CLIP_WEIGHT * self.plan.apply(inside - x, self.weight).double().square().sum()
        return float(error)

    def bias_correction(self, weight: Tensor, qparams: QParams | None, groups: int) -> Tensor:
        """Mean over the probe of what the output lost, [G, O]; 0 for groups it does not hold.

        weight: what the codes stand for, smoothing folded in. Nagel et al. 2019 (1906.04721),
        sec. 4.2, here per group of timesteps.
        """
        correction = torch.zeros(groups, len(weight))
        for group, parts in self.parts.items():
            x = torch.cat(parts)
            y = x
            if qparams is not None:
                y = fake_quantize(x, qparams.at(group), activation_spec(self.plan.activation_bits))
            lost = self.plan.apply(x, self.weight) - self.plan.apply(y, weight)
            correction[group] = lost.movedim(self.plan.channel_axis, 0).flatten(1).mean(1)
        return correction


def cost(config: Config, judged: list[LayerPlan], call: DenoiserCall) -> Cost:
    """Probes of the layers that are judged, and each layer on its own at every pair of ends."""
    tried = len(FRACTIONS) ** 2
    macs = sum(tried * call.layer_macs.get(p.name, 0) * kept_rows(config, p, call) for p in judged)
    probing = probing_cost(config, judged, call)
    return replace(probing, macs=probing.macs + macs)
