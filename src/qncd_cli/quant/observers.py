"""Observers collect the statistics from which activation ranges are chosen.

One observer sees the input of one layer during calibration, split into G groups of timesteps.
Its state is plain tensors, independent of bit width, so that every range method at every width
can be read from one calibration. Observers merge exactly and in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import NotFinite
from ..spec import QSpec
from .affine import choose_qparams, fake_quantize

HISTOGRAM_BINS = 2048
MAX_SAMPLES = 16384
"""Elements of one tensor that enter the histogram (an even stride through all of them)."""
BATCH_ROWS = 16
"""Rows of the batches whose extremes are averaged (Q-Diffusion's txt2img.py: 16). More rows give
wider ranges."""
SEARCH_POINTS = 64
MIN_EXPONENT = -20


class RangeObserver:
    """Minimum, maximum, mean extremes of small batches and a histogram per timestep group.

    The histogram has 2048 bins over [-2^k, 2^k), k per group; k grows by merging pairs of bins,
    which is exact, so the order of updates and merges does not matter.
    """

    def __init__(self, in_channels: int, channel_axis: int, groups: int = 1):
        self.channel_axis = channel_axis
        self.min = torch.full((groups,), math.inf)
        self.max = torch.full((groups,), -math.inf)
        self.row_extremes: list[list[Tensor]] = [[] for _ in range(groups)]
        self.histogram = torch.zeros((groups, HISTOGRAM_BINS), dtype=torch.int64)
        self.exponent = torch.full((groups,), MIN_EXPONENT, dtype=torch.int64)
        self.channel_absmax = torch.zeros(in_channels)

    @property
    def seen(self) -> bool:
        """Whether there was any input."""
        return bool(self.histogram.any())

    def update(self, x: Tensor, group: int) -> None:
        """x: input of the layer, batch first, channels along channel_axis (1 or -1).
        group: index of the timestep group.

        Raises NotFinite if x holds a NaN or an infinity.
        """
        x = x.detach().to(torch.float32)
        rows = x.reshape(len(x), -1)
        self.row_extremes[group].append(torch.stack([rows.amin(1), rows.amax(1)]).cpu())
        low = self._per_channel(x.amin(0), torch.amin)
        high = self._per_channel(x.amax(0), torch.amax)
        x_min, x_max = low.min().cpu(), high.max().cpu()
        if not (torch.isfinite(x_min) and torch.isfinite(x_max)):
            raise NotFinite("activations are not finite")
        absmax = torch.maximum(-low, high).clamp(min=0).cpu()
        self.channel_absmax = torch.maximum(self.channel_absmax, absmax)
        self.min[group] = torch.minimum(self.min[group], x_min)
        self.max[group] = torch.maximum(self.max[group], x_max)
        self._count(x, max(-x_min.item(), x_max.item()), group)

    def _per_channel(self, x: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        """x without its batch (reduced first: many times faster) -> [C]."""
        axis = self.channel_axis - 1 if self.channel_axis > 0 else x.ndim - 1
        others = [i for i in range(x.ndim) if i != axis]
        return reduce(x, others) if others else x

    def _count(self, x: Tensor, absmax: float, group: int) -> None:
        needed = MIN_EXPONENT
        if absmax > 0:
            needed = max(MIN_EXPONENT, math.frexp(absmax)[1])  # absmax < 2^needed
        self._grow(group, needed)
        flat = x.reshape(-1)
        stride = max(1, math.ceil(flat.numel() / MAX_SAMPLES))
        half = HISTOGRAM_BINS // 2
        width = 2.0 ** int(self.exponent[group]) / half
        index = torch.floor(flat[::stride] / width).to(torch.int64) + half
        counts = torch.bincount(index.clamp(0, HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)
        self.histogram[group] += counts.cpu()

    def _grow(self, group: int, exponent: int) -> None:
        if int(self.exponent[group]) < exponent and not self.histogram[group].any():
            self.exponent[group] = exponent
        quarter = HISTOGRAM_BINS // 4
        while int(self.exponent[group]) < exponent:
            pairs = self.histogram[group].reshape(-1, 2).sum(1)
            grown = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64)
            grown[quarter : 3 * quarter] = pairs
            self.histogram[group] = grown
            self.exponent[group] += 1

    def merge(self, other: RangeObserver) -> None:
        """Take in what another observer of the same layer saw (another process, say)."""
        self.min = torch.minimum(self.min, other.min)
        self.max = torch.maximum(self.max, other.max)
        self.channel_absmax = torch.maximum(self.channel_absmax, other.channel_absmax)
        for mine, theirs in zip(self.row_extremes, other.row_extremes, strict=True):
            mine += theirs
        for group in range(len(self.min)):
            exponent = max(int(self.exponent[group]), int(other.exponent[group]))
            self._grow(group, exponent)
            lifted = RangeObserver(1, 0)
            lifted.histogram[0] = other.histogram[group]
            lifted.exponent[0] = other.exponent[group]
            lifted._grow(0, exponent)
            self.histogram[group] += lifted.histogram[0]

    def state(self) -> dict[str, Tensor]:
        """The artifact's tensors by the name behind `<layer>.input_`."""
        means = torch.full((2, len(self.min)), math.nan)
        for group, rows in enumerate(self.row_extremes):
            if rows:
                means[:, group] = mean_extremes(torch.cat(rows, 1))
        return self._exact() | {"batch_min": means[0], "batch_max": means[1]}

    def memory(self) -> dict[str, Tensor]:
        """Everything that was seen, for another observer of the same layer to go on from."""
        rows = [torch.cat(r, 1) if r else torch.empty(2, 0) for r in self.row_extremes]
        fits = int(self.histogram.max()) <= torch.iinfo(torch.int32).max
        counts = {"histogram": self.histogram.to(torch.int32 if fits else torch.int64)}
        return self._exact() | counts | {f"rows_{group}": r for group, r in enumerate(rows)}

    def restore(self, memory: dict[str, Tensor]) -> None:
        """Go on from what another observer of the same layer has seen."""
        self.exponent = memory["histogram_exponent"].clone()
        for name in ("min", "max", "histogram", "channel_absmax"):
            setattr(self, name, memory[name].to(getattr(self, name).dtype, copy=True))
        rows = [memory[f"rows_{group}"] for group in range(len(self.min))]
        self.row_extremes = [[r.clone()] if r.numel() else [] for r in rows]

    def _exact(self) -> dict[str, Tensor]:
        return {
            "min": self.min,
            "max": self.max,
            "histogram": self.histogram,
            "histogram_exponent": self.exponent,
            "channel_absmax": self.channel_absmax,
        }


def mean_extremes(rows: Tensor, batch: int = BATCH_ROWS) -> Tensor:
    """The extremes of a batch of rows, in expectation over all batches of that size.

    This is what a running mean over randomly mixed batches tends to (Q-Diffusion's
    `--running_stat`), without its chance and in any order of the rows.

    rows: [2, R], minimum and maximum of each row. Returns [2], float32.
    """
    count = rows.shape[1]
    if count <= batch:
        return torch.stack([rows[0].min(), rows[1].max()])
    # The i-th smallest of n values is the smallest of k drawn with C(n-1-i, k-1) / C(n, k).
    rank = torch.arange(count, dtype=torch.float64)
    kept = (count - rank[: count - batch] - batch) / (count - rank[: count - batch] - 1)
    weights = torch.zeros(count, dtype=torch.float64)
    weights[0] = batch / count
    weights[1 : count - batch + 1] = batch / count * kept.cumprod(0)
    low = weights @ rows[0].to(torch.float64).sort().values
    high = weights @ rows[1].to(torch.float64).sort(descending=True).values
    return torch.stack([low, high]).to(torch.float32)


# ------------------------------------------------------------------ state -> range


def _bin_centres(exponent: int) -> Tensor:
    half = HISTOGRAM_BINS // 2
    return (torch.arange(HISTOGRAM_BINS) - half + 0.5) * (2.0**exponent / half)


def minmax_range(state: dict[str, Tensor], group: int) -> tuple[Tensor, Tensor]:
    return state["min"][group], state["max"][group]


def batch_mean_range(state: dict[str, Tensor], group: int) -> tuple[Tensor, Tensor]:
    return state["batch_min"][group], state["batch_max"][group]


def percentile_range(
    state: dict[str, Tensor], group: int, percentile: float
) -> tuple[Tensor, Tensor]:
    """The range that leaves (100 - percentile) / 2 percent of the values out at either end."""
    counts = state["histogram"][group]
    centres = _bin_centres(int(state["histogram_exponent"][group]))
    cumulative = counts.cumsum(0).to(torch.float64) / counts.sum()
    tail = (1 - percentile / 100) / 2
    low = centres[torch.searchsorted(cumulative, torch.tensor(tail, dtype=torch.float64))]
    top = torch.searchsorted(cumulative, torch.tensor(1 - tail, dtype=torch.float64))
    high = centres[top.clamp(max=HISTOGRAM_BINS - 1)]
    x_min, x_max = minmax_range(state, group)
    return low.clamp(x_min, x_max), high.clamp(x_min, x_max)


def mse_range(state: dict[str, Tensor], group: int, spec: QSpec) -> tuple[Tensor, Tensor]:
    """The range with the least squared quantization error over the histogram.

    Searched from min-max inwards, one end at a time, twice round: an end is tried at 64 evenly
    spaced fractions of its extreme value, so that a short end (SiLU's) is kept while a long
    tail at the other is clipped.
    """
    counts = state["histogram"][group]
    occupied = counts.nonzero().flatten()
    x_min, x_max = minmax_range(state, group)
    low, high = x_min.clamp(max=0), x_max.clamp(min=0)
    if len(occupied) < 2 or not high > low:
        return x_min, x_max
    values = _bin_centres(int(state["histogram_exponent"][group]))[occupied]
    values = values.clamp(x_min, x_max)
    weights = counts[occupied].to(torch.float64)
    fractions = torch.linspace(1, 1 / SEARCH_POINTS, SEARCH_POINTS)
    row_spec = QSpec(spec.bits, spec.symmetric, axis=0)

    def best(lows: Tensor, highs: Tensor) -> int:
        qparams = choose_qparams(lows, highs, row_spec)
        rows = values.expand(len(lows), -1)
        error = (fake_quantize(rows, qparams, row_spec) - rows).to(torch.float64).square()
        return int((error @ weights).argmin())

    full_low, full_high = low, high
    for _ in range(2):
        high = (full_high * fractions)[best(low.expand(SEARCH_POINTS), full_high * fractions)]
        low = (full_low * fractions)[best(full_low * fractions, high.expand(SEARCH_POINTS))]
    return low, high


def choose_range(
    state: dict[str, Tensor], observer: str, spec: QSpec, percentile: float = 99.99
) -> tuple[Tensor, Tensor]:
    """(x_min, x_max), both [G], by the named method. A group that saw nothing takes the union."""
    seen = state["histogram"].sum(1) > 0
    lows, highs = [], []
    for group in range(len(seen)):
        if not seen[group]:
            lows.append(state["min"][seen].min())
            highs.append(state["max"][seen].max())
            continue
        low, high = {
            "minmax": lambda g: minmax_range(state, g),
            "moving_average": lambda g: batch_mean_range(state, g),
            "percentile": lambda g: percentile_range(state, g, percentile),
            "mse": lambda g: mse_range(state, g, spec),
        }[observer](group)
        lows.append(low)
        highs.append(high)
    return torch.stack(lows), torch.stack(highs)
