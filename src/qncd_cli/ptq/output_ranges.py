"""Activation ranges and bias corrections, judged by what they do to a layer's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..config.schema import Config
from ..quant.affine import QParams, choose_qparams, fake_quantize
from ..quant.observers import choose_range
from ..quant.smoothing import SmoothingFactor
from ..runtime.denoiser import timestep_group
from ..spec import activation_spec
from .calibration_probes import cost as probing_cost
from .calibration_probes import kept_rows
from .cost import Cost, DenoiserCall
from .layer_plan import LayerPlan
from .probes import Probe

FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Fractions of the min-max range that are tried at either end, in all pairs."""
TRIED_PASSES = 25
"""Passes over a layer's kept inputs for each pair of ends that is tried. Fitted as
`cost.OBSERVING`."""
SHORTLIST = 6
"""Ranges whose error is computed in full, beside min-max and that of least squared error; all
others are left out by an estimate. A larger value takes longer and finds the same range."""
CLIP_WEIGHT = 4.0
"""What clipping cuts off is cut off again at every step; rounding errors average out."""


def judged_by_output(config: Config, plans: list[LayerPlan]) -> list[LayerPlan]:
    """Those whose range or bias is chosen by what becomes of the layer's output."""
    return [p for p in plans if p.observer == "output" or config.quantization.bias_correction]


class LayerOutput:
    """What quantizing one layer does to its output, on inputs of a probe.

    Inputs are smoothed by factor first; weight: the layer's own, smoothing folded in. step_weight:
    how much an error at a timestep counts within its group.
    """

    def __init__(
        self,
        plan: LayerPlan,
        probe: Probe,
        factor: SmoothingFactor,
        bounds: tuple[float, ...],
        step_weight: Callable[[float], float] = lambda t: 1.0,
    ):
        self.plan = plan
        self.weight = factor.fold(plan.layer.weight.detach().float().cpu())
        self.parts: dict[int, list[Tensor]] = {}
        self.counts: dict[int, list[float]] = {}
        self._roots: Tensor | None = None
        for t, x in probe.parts:
            smoothed, group = factor.apply(x, plan.channel_axis), timestep_group(t, bounds)
            self.parts.setdefault(group, []).append(smoothed)
            self.counts.setdefault(group, []).extend([step_weight(t)] * len(x))

    def ranges(self, state: dict[str, Tensor], percentile: float) -> tuple[Tensor, Tensor]:
        """(x_min, x_max), [G] each: per group the range with the least error of the output.

        Candidates: min-max, its fractions at either end, and the range of least squared error;
        of the fractions, those of the shortlist.
        state: of the layer's observer. A group that the probe does not hold takes min-max.
        """
        spec = activation_spec(self.plan.activation_bits)
        low, high = (x.clone() for x in choose_range(state, "minmax", spec))
        tight = choose_range(state, "mse", spec, percentile)
        for group, parts in self.parts.items():
            x, whole = torch.cat(parts), (float(low[group]), float(high[group]))
            self._roots = self._counts_of(group, x)
            short = whole[0] > -0.1 * whole[1]  # a short end (SiLU's): in full, or mse's
            pairs = [(a, b) for a in FRACTIONS[: 1 if short else None] for b in FRACTIONS]
            found = [(1.0, 1.0), *self._shortlist(x, whole, pairs)]
            ends = [(low[group] * a, high[group] * b) for a, b in found]
            ends.append((tight[0][group], tight[1][group]))
            errors = [self._error(x, *pair) for pair in ends]
            low[group], high[group] = ends[errors.index(min(errors))]
        return low, high

    def _shortlist(
        self, x: Tensor, whole: tuple[float, float], pairs: list[tuple[float, float]]
    ) -> list[tuple[float, float]]:
        """Pairs of fractions with the least estimated errors, at most SHORTLIST.

        Rounding grows with the square of the step, as that of evenly spread values does, from what
        it is at the whole range. Clipping is measured at either end by itself.
        """
        low, high = whole
        below = {a: self._energy(x.clamp(min=a * low) - x) for a in {a for a, _ in pairs}}
        above = {b: self._energy(x.clamp(max=b * high) - x) for b in {b for _, b in pairs}}
        rounding = self._error(x, torch.tensor(low), torch.tensor(high))

        def estimate(pair: tuple[float, float]) -> float:
            a, b = pair
            step = (b * high - a * low) / max(high - low, 1e-30)
            return rounding * step**2 + CLIP_WEIGHT * (below[a] + above[b])

        return sorted((p for p in pairs if p != (1.0, 1.0)), key=estimate)[:SHORTLIST]

    def _counts_of(self, group: int, x: Tensor) -> Tensor | None:
        """Roots of what each row counts, to be multiplied with x; None where all count alike."""
        counts = torch.tensor(self.counts[group])
        if (counts == counts[0]).all():
            return None
        return counts.sqrt().reshape(-1, *[1] * (x.ndim - 1))

    def _error(self, x: Tensor, low: Tensor, high: Tensor) -> float:
        """Squared error of the output, summed, with what is clipped counted CLIP_WEIGHT times."""
        spec = activation_spec(self.plan.activation_bits)
        qparams = choose_qparams(low, high, spec)
        top = (spec.qmax - qparams.zero_point) * qparams.scale
        bottom = (spec.qmin - qparams.zero_point) * qparams.scale
        inside = x.clamp(float(bottom), float(top))
        rounding = self._energy(fake_quantize(x, qparams, spec).sub_(inside), everywhere=True)
        return rounding + CLIP_WEIGHT * self._energy(inside.sub_(x))

    def _energy(self, change: Tensor, *, everywhere: bool = False) -> float:
        """Squared sum of what a change of the input does to the output.

        Samples of a convolution, and vectors of a linear layer, that are zero need no product.
        everywhere: there are none to look for.
        """
        if self._roots is not None:
            change = change * self._roots
        rows = change if self.plan.is_conv else change.flatten(0, -2)
        if not everywhere:
            touched = rows.flatten(1).any(1)
            if not touched.all():
                rows = rows[touched]
            if not len(rows):
                return 0.0
        return float(self.plan.apply(rows, self.weight).square_().sum(dtype=torch.float64))

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
    tried = 2 * len(FRACTIONS) + SHORTLIST + 3  # clipping is a few rows, mostly
    rows = {name: tried * count for name, count in kept_rows(config, judged, call).items()}
    macs = sum(count * call.layer_macs.get(name, 0) for name, count in rows.items())
    passes = TRIED_PASSES * sum(count * call.inputs.get(name, 0) for name, count in rows.items())
    probing = probing_cost(config, judged, call)
    kept = probing.kept if config.quantization.bias_correction else 0
    return replace(probing, macs=probing.macs + macs, passes=probing.passes + passes, kept=kept)
