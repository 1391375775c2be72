"""What a run's artifacts tell of a quantized model: noise by step, layers, channels' ranges.

Arguments are contents of artifacts (store/artifact_kinds.py has their grammar); whatever was not
measured is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..spec import FLOAT_BITS, Widths

Tensors = Mapping[str, Tensor]
HEAT = 6
"""Steps of colour of the network's map; more are not told apart."""
HEAT_DB = 6.0
"""Decibels from one to the next, downwards from the layer with the largest error."""
WORST_LAYERS = 10
WORST_RANGES = 6
CURVE_POINTS = 64
"""Points of a curve of sorted channels; a layer has up to thousands."""
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class NoiseCurves:
    """Quantization noise at each step, in the order of sampling.

    timesteps: of the schedule; mean, spread: curve -> root mean square over channels of the noise's
    mean, root of its mean variance.
    """

    timesteps: Sequence[int]
    mean: Mapping[str, Sequence[float]]
    spread: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Layer:
    """One layer. error: share of the power, None where nothing measured it; heat: 0 (least or
    unknown) to HEAT - 1; share: of all multiplications."""

    name: str
    kind: str
    bits: str
    error: float | None
    heat: int
    share: float
    why: str

    @property
    def error_db(self) -> float | None:
        """The error in decibels below the power; None where it is unknown or nothing."""
        return None if not self.error else 10 * math.log10(self.error)


@dataclass(frozen=True)
class Network:
    """The layers in the order of calls, by block. error_says: what their errors are of."""

    error_says: str = ""
    blocks: Mapping[str, Sequence[Layer]] = field(default_factory=dict)

    @property
    def worst(self) -> list[Layer]:
        """The layers with the largest errors."""
        layers = [layer for block in self.blocks.values() for layer in block if layer.error]
        return sorted(layers, key=lambda layer: -(layer.error or 0))[:WORST_LAYERS]


@dataclass(frozen=True)
class Ranges:
    """Channels of one layer's input, widest first, over the median: before and after smoothing.

    widest: how many times the median the widest channel is, before and after.
    """

    name: str
    curves: Mapping[str, Sequence[float]]
    widest: tuple[float, float]


def noise_curves(statistics: Tensors) -> NoiseCurves | None:
    """The quantization noise before any correction and after those that statistics tell of.

    statistics: tensors of noise_stats. What PTQD leaves is eps~ less the mean of its residual over
    1 + k: no mean, and the residual's variance over (1 + k)^2 (docs/method.md). None where there
    are no steps.
    """
    steps = statistics["timesteps"].tolist()
    if not steps:
        return None
    k = 1 + statistics["correlation_k"].double()
    power = statistics["mean"].double().square().mean(1)
    variance = statistics["variance"].double().mean(1)
    left = statistics["residual_variance"].double() / k.square()
    raw, ptqd, affine = "no correction", "ptqd", "affine"
    shifted = statistics["affine_mean"].double().square().mean(1)
    mean = {raw: power.sqrt(), ptqd: torch.zeros_like(power), affine: shifted.sqrt()}
    spread = {
        raw: variance.sqrt(),
        ptqd: left.sqrt(),
        affine: statistics["affine_variance"].double().sqrt(),
    }
    return NoiseCurves(
        steps[::-1],
        {name: values.flip(0).tolist() for name, values in mean.items()},
        {name: values.flip(0).tolist() for name, values in spread.items()},
    )


# ------------------------------------------------------------------ layers


def network(coverage: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> Network:
    """The network's layers with bits and errors.

    coverage: of coverage.json; entries: `layers` of the quantized artifact's body. The error is
    that of the prediction, where extra bits were decided by it, else that of the layer's own output
    after rounding.
    """
    rows = coverage["layers"]
    estimated = {
        name: e["estimated_error"]["input"] + e["estimated_error"]["weight"]
        for name, e in entries.items()
        if e.get("estimated_error")
    }
    own = {
        name: e["relative_output_error"]
        for name, e in entries.items()
        if e.get("relative_output_error") is not None
    }
    errors, says = (estimated, ESTIMATED) if estimated else (own, OWN)
    total = sum(row["macs"] for row in rows) or 1
    largest = max((v for v in errors.values() if math.isfinite(v)), default=0.0)
    blocks: dict[str, list[Layer]] = {}
    for row in rows:
        error = errors.get(row["name"])
        layer = Layer(
            row["name"],
            row["kind"],
            _bits(row),
            error,
            _heat(error, largest),
            row["macs"] / total,
            row["why_not_integer"],
        )
        blocks.setdefault(block_of(row["name"]), []).append(layer)
    return Network(says if errors else "", blocks)


ESTIMATED = (
    "error that rounding the layer's weight and input to the preset's bits makes in the prediction,"
    " as a share of its power: what decided which layers got more bits"
)
OWN = "error that rounding the weight makes in the layer's own output, as a share of its power"


def block_of(name: str) -> str:
    """The block of a layer: its first name and the number behind it, or the layer's own name."""
    parts = name.split(".")[:-1]
    if len(parts) > 1 and parts[1].isdigit():
        return ".".join(parts[:2])
    return parts[0] if parts else name


def _bits(row: Mapping[str, Any]) -> str:
    widths = Widths(row["weight_bits"], row["activation_bits"])
    if widths.weights == widths.activations == FLOAT_BITS:
        return "float"
    return widths.label


def _heat(error: float | None, largest: float) -> int:
    if not error or not math.isfinite(error):
        return 0
    below = 10 * math.log10(largest / error) / HEAT_DB
    return max(HEAT - 1 - math.floor(below), 0)


# ------------------------------------------------------------------ ranges


def channel_ranges(calibration: Tensors, smoothing: Tensors) -> list[Ranges]:
    """The smoothed layers whose channels' ranges differed most, the worst first.

    calibration, smoothing: tensors of these artifacts. Calibration saw smoothed inputs; before
    smoothing a channel was as wide as that times its factor. Layers whose input is shifted or
    rotated first are left out: how wide their channels were is not known.
    """
    found = []
    for key, factor in smoothing.items():
        name, _, what = key.rpartition(".")
        after = calibration.get(f"{name}.input_channel_absmax")
        if what != "smoothing" or after is None:
            continue
        if f"{name}.shift" in smoothing or f"{name}.rotation" in smoothing:
            continue
        both = {BEFORE: after.double() * factor.double(), AFTER: after.double()}
        medians = {when: values.median() for when, values in both.items()}
        if min(medians.values()) <= 0:
            continue
        curves = {when: _sorted(values / medians[when]) for when, values in both.items()}
        found.append(Ranges(name, curves, (curves[BEFORE][0], curves[AFTER][0])))
    return sorted(found, key=lambda ranges: -ranges.widest[0])[:WORST_RANGES]


def _sorted(values: Tensor) -> list[float]:
    """Values from the largest on, thinned to CURVE_POINTS, both ends among them."""
    ordered = values.sort(descending=True).values
    count = min(CURVE_POINTS, len(ordered))
    return ordered[torch.linspace(0, len(ordered) - 1, count).round().long()].tolist()
