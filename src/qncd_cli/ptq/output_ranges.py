"""Activation ranges and bias corrections, judged by what they do to a layer's output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

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


class _Rows(NamedTuple):
    """rows: [N, ...], each of one product; least, largest: [N], of a row's values; roots: of what
    each row counts, shaped to be multiplied with rows; None where all count alike."""

    rows: Tensor
    least: Tensor
    largest: Tensor
    roots: Tensor | None


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
            inputs = self._rows_of(torch.cat(parts), group)
            whole = float(low[group]), float(high[group])
            short = whole[0] > -0.1 * whole[1]  # a short end (SiLU's): in full, or mse's
            pairs = [(a, b) for a in FRACTIONS[: 1 if short else None] for b in FRACTIONS]
            found = [(1.0, 1.0), *self._shortlist(inputs, whole, pairs)]
            a, b = (torch.tensor(tried) for tried in zip(*found, strict=True))
            lows = torch.cat([low[group] * a, tight[0][group, None]])
            highs = torch.cat([high[group] * b, tight[1][group, None]])
            errors = self._errors(inputs, lows, highs)
            best = errors.index(min(errors))
            low[group], high[group] = lows[best], highs[best]
        return low, high

    def _rows_of(self, x: Tensor, group: int) -> _Rows:
        """The inputs of a group: samples of a convolution, vectors of a linear layer."""
        rows = x if self.plan.is_conv else x.flatten(0, -2)
        counts = torch.tensor(self.counts[group])
        roots = None
        if not (counts == counts[0]).all():
            roots = counts.sqrt().repeat_interleave(len(rows) // len(x))
            roots = roots.reshape(-1, *[1] * (rows.ndim - 1))
        flat = rows.flatten(1)
        return _Rows(rows, flat.amin(1), flat.amax(1), roots)

    def _shortlist(
        self, inputs: _Rows, whole: tuple[float, float], pairs: list[tuple[float, float]]
    ) -> list[tuple[float, float]]:
        """Pairs of fractions with the least estimated errors, at most SHORTLIST.

        Rounding grows with the square of the step, as that of evenly spread values does, from what
        it is at the whole range. Clipping is measured at either end by itself.
        """
        low, high = whole
        below = {a: self._clipping(inputs, low=a * low) for a in {a for a, _ in pairs}}
        above = {b: self._clipping(inputs, high=b * high) for b in {b for _, b in pairs}}
        (rounding,) = self._errors(inputs, torch.tensor([low]), torch.tensor([high]))

        def estimate(pair: tuple[float, float]) -> float:
            a, b = pair
            step = (b * high - a * low) / max(high - low, 1e-30)
            return rounding * step**2 + CLIP_WEIGHT * (below[a] + above[b])

        return sorted((p for p in pairs if p != (1.0, 1.0)), key=estimate)[:SHORTLIST]

    def _errors(self, inputs: _Rows, lows: Tensor, highs: Tensor) -> list[float]:
        """Squared error of the output, summed, for each range of [N] and [N]; what is clipped
        counts CLIP_WEIGHT times."""
        spec = activation_spec(self.plan.activation_bits)
        qparams = choose_qparams(lows, highs, spec)
        bottoms, tops = (
            ((code - qparams.zero_point) * qparams.scale).tolist()
            for code in (spec.qmin, spec.qmax)
        )
        errors = []
        for i, (bottom, top) in enumerate(zip(bottoms, tops, strict=True)):
            rounded = fake_quantize(inputs.rows, qparams.at(i), spec)
            rounding = self._energy(rounded.sub_(inputs.rows.clamp(bottom, top)), inputs.roots)
            errors.append(rounding + CLIP_WEIGHT * self._clipping(inputs, bottom, top))
        return errors

    def _clipping(self, inputs: _Rows, low: float = -math.inf, high: float = math.inf) -> float:
        """Squared sum of what clipping to [low, high] does to the output. Rows without a value
        beyond need no product."""
        touched = (inputs.least < low) | (inputs.largest > high)
        if not touched.any():
            return 0.0
        rows = inputs.rows[touched]
        roots = None if inputs.roots is None else inputs.roots[touched]
        return self._energy(rows.clamp(low, high).sub_(rows), roots)

    def _energy(self, change: Tensor, roots: Tensor | None) -> float:
        """Squared sum of what a change of the input, which it may overwrite, does to the output."""
        if roots is not None:
            change.mul_(roots)
        return float(self.plan.apply(change, self.weight).square_().sum(dtype=torch.float64))

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
