"""How far a number would move if other images had been drawn: 95 % bootstrap intervals.

Images are drawn again by weights: how often each of them was drawn, the same for two sets that
share their seeds. Features are never computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

ROUNDS = 100
"""Rounds of a bootstrap; more: ends of an interval that vary less, by 1 over the root."""
CONFIDENCE = (0.025, 0.975)
KERNEL_IMAGES = 5000
"""Images whose kernel is resampled, 200 MB; of more, these stand for all, and what they move by is
scaled by the root of their share."""
KERNEL_ROWS = 1000


def weights(count: int, rounds: int = ROUNDS, seed: int = 0) -> Tensor:
    """How often each of count images is drawn in each round: float64 [rounds, count]."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=rounds)
    return torch.from_numpy(drawn.astype(np.float64))


def interval(
    value: float, replicates: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)
) -> tuple[float | None, float | None]:
    """(low, high) around a value: the quantiles of the replicates' deviations from their mean.

    A resampled set holds fewer distinct images, which moves a distance away; deviations do not have
    that shift. The interval speaks of sets of this size. None, None without replicates, or where
    one of them is not finite. bounds: what the number cannot pass.
    """
    if not len(replicates) or not np.isfinite(replicates).all():
        return None, None
    ends = np.quantile(replicates - replicates.mean(), CONFIDENCE, method="weibull")
    low, high = np.clip(value + ends, *bounds)
    return float(low), float(high)


def of_statistic(
    statistic: Callable[[np.ndarray], float], values: Sequence[float] | np.ndarray, drawn: Tensor
) -> np.ndarray:
    """A statistic of the values that each round drew. drawn: [R, N]; values: [N, ...]."""
    values = np.asarray(values)
    rows = np.arange(len(values))
    counts = drawn.numpy().astype(np.int64)
    return np.array([statistic(values[np.repeat(rows, times)]) for times in counts])


def of_shares(inside: Tensor, drawn: Tensor) -> np.ndarray:
    """The share of the images that are inside, of those that each round drew. inside: bool [N]."""
    return (drawn @ inside.to(torch.float64) / len(inside)).numpy()


def of_class_score(logits: Tensor, drawn: Tensor, splits: int) -> np.ndarray:
    """Inception scores of resampled images, those of each split among themselves.

    logits: [N, K] in the order of the splits. Returns R numbers, one for each row of drawn [R, N].
    """
    rows = logits.to(torch.float64)
    found = []
    for i in range(splits):
        part = slice(i * len(rows) // splits, (i + 1) * len(rows) // splits)
        log_p = rows[part].log_softmax(1)
        share = drawn[:, part] / drawn[:, part].sum(1, keepdim=True)
        mean = share @ log_p.exp()
        certain = share @ (log_p.exp() * log_p).sum(1)
        found.append((certain - torch.xlogy(mean, mean).sum(1)).exp())
    return torch.stack(found).nanmean(0).numpy()  # a split of which no image was drawn is none


def of_kernel_distance(features: Tensor, other: Tensor, drawn: Tensor, seed: int = 0) -> np.ndarray:
    """Kernel distances of resampled features to fixed ones, but for a constant.

    features: [N, D]; other: [M, D]. Returns R numbers, one for each row of drawn [R, N].
    """
    generator = torch.Generator().manual_seed(seed)
    kept, partners = (
        torch.randperm(len(rows), generator=generator)[:KERNEL_IMAGES] for rows in (features, other)
    )
    mine, its = features[kept].to(torch.float64), other[partners].to(torch.float64)
    counts = drawn[:, kept]
    within, across = [], []
    for rows in torch.arange(len(mine)).split(KERNEL_ROWS):
        kernel = (mine[rows] @ mine.T / mine.shape[1] + 1) ** 3
        kernel[torch.arange(len(rows)), rows] = 0  # an image is no pair with itself
        within.append((counts[:, rows] * (counts @ kernel.T)).sum(1))
        across.append(counts[:, rows] @ ((mine[rows] @ its.T / mine.shape[1] + 1) ** 3).mean(1))
    total = counts.sum(1)
    pairs = total.square() - counts.square().sum(1)
    found = (sum(within) / pairs - 2 * sum(across) / total).numpy()
    mean = found.mean() if len(found) else 0.0
    return (found - mean) * (len(mine) / len(features)) ** 0.5
