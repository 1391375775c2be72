"""The Frechet distance of two sets of features, what it varies by, and its limit.

All sums are taken in float64. Source: Heusel et al. 2017 (arXiv 1706.08500), eq. (6).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Statistics = dict[str, np.ndarray]  # mu [D] and sigma [D, D], float64
DIRECT = 512
"""Largest matrix, in rows, whose eigenvalues are taken again in every round of a bootstrap: 50 ms.
Above it, where images are many, the first derivative of the distance stands for it."""
MANY = 5
"""Images for each feature from which on that derivative says how the distance varies: its spread is
then 0.96 of the direct one's, and 0.6 where images are as few as features."""
ROUNDS_OF_FEW = 24
"""Rounds where neither is so, each of which takes seconds at Inception's 2,048 features."""
PARTS = (1, 2, 3)
"""Parts that a set is cut into for its limit; more parts: a longer lever, smaller sets."""
PARTITIONS = 2
"""Random cuts into each of these numbers of parts; more: less noise, more time."""


def statistics(features: Tensor) -> Statistics:
    """features [N, D], N >= 2 -> mu [D], sigma [D, D] (over N - 1), float64."""
    rows = features.to(torch.float64)
    mean = rows.mean(0)
    centred = rows - mean
    sigma = centred.T @ centred / (len(rows) - 1)
    return {"mu": mean.numpy(), "sigma": ((sigma + sigma.T) / 2).numpy()}


def distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2)), >= 0.

    It stays defined when there are fewer images than features (singular sigma), but its bias
    grows as the number of images falls: compare sets of equal size only.
    """
    mu_a, sigma_a, mu_b, sigma_b = (
        torch.from_numpy(np.ascontiguousarray(s[key], np.float64))
        for s in (a, b)
        for key in ("mu", "sigma")
    )
    # the trace of the root is the sum of singular values: no root is taken of rounding errors
    root = torch.linalg.svdvals(factor(sigma_a).T @ factor(sigma_b)).sum()
    traces = sigma_a.trace() + sigma_b.trace()
    return max(float((mu_a - mu_b).square().sum() + traces - 2 * root), 0.0)


def factor(sigma: Tensor) -> Tensor:
    """L [D, R] with L L^T = sigma, R its numerical rank. sigma: [D, D] float64, symmetric."""
    values, vectors = torch.linalg.eigh(sigma)
    least = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    kept = values > least
    return vectors[:, kept] * values[kept].sqrt()


# ------------------------------------------------------------------ a bootstrap's replicates


def replicates_to_statistics(
    features: Tensor, other: Mapping[str, np.ndarray], weights: Tensor
) -> np.ndarray:
    """Distances of resampled features to fixed statistics, linear ones but for a constant.

    features: [N, D]; weights: [R, N], how often each row was drawn, rows that sum to N. Returns R
    numbers.
    """
    rows = features.to(torch.float64)
    count, mean = len(rows), rows.mean(0)
    centred = rows - mean
    other_mu, other_sigma = (torch.from_numpy(other[key]) for key in ("mu", "sigma"))
    root = factor(other_sigma)
    if min(count, root.shape[1]) > DIRECT and count >= MANY * root.shape[1]:
        return (weights @ _influence(centred, mean - other_mu, root) / count).numpy()
    seen = centred @ root  # [N, R]: its covariance has the eigenvalues of the product
    lengths, trace = centred.square().sum(1), other_sigma.trace()
    found = []
    for drawn in _rounds(weights, min(count, root.shape[1])):
        shift = drawn @ centred / count
        spread = (drawn @ lengths - count * shift.square().sum()) / (count - 1)
        root_trace = _nuclear(_weighted(seen, drawn))
        apart = (mean + shift - other_mu).square().sum()
        found.append(float(apart + spread + trace - 2 * root_trace))
    return np.array(found)


def replicates_to_features(
    features: Tensor, other: Tensor, weights: Tensor, other_weights: Tensor
) -> np.ndarray:
    """Distances of two resampled sets, paired where the weights are the same.

    features: [N, D]; other: [M, D]; weights: [R, N]; other_weights: [R, M]. Returns R numbers,
    linear ones but for a constant.
    """
    a, b = features.to(torch.float64), other.to(torch.float64)
    sides = ((a, weights), (b, other_weights))
    size = min(a.shape[1], max(len(a), len(b)))
    if size > DIRECT and min(len(a), len(b)) >= MANY * size:
        roots = [factor(torch.from_numpy(statistics(x)["sigma"])) for x in (b, a)]
        shift = a.mean(0) - b.mean(0)
        moves = [
            drawn @ _influence(x - x.mean(0), sign * shift, root) / len(x)
            for (x, drawn), root, sign in zip(sides, roots, (1, -1), strict=True)
        ]
        return torch.stack(moves).sum(0).numpy()
    found = []
    pairs = zip(_rounds(weights, size), _rounds(other_weights, size), strict=True)
    for drawn, other_drawn in pairs:
        shift = drawn @ a / len(a) - other_drawn @ b / len(b)
        one, two = _weighted(a, drawn), _weighted(b, other_drawn)
        if min(len(a), len(b)) < a.shape[1]:
            trace = torch.linalg.svdvals(one @ two.T).sum()
        else:
            trace = _nuclear(two @ factor(one.T @ one))
        traces = one.square().sum() + two.square().sum()
        found.append(float(shift.square().sum() + traces - 2 * trace))
    return np.array(found)


def _rounds(weights: Tensor, size: int) -> Tensor:
    """The rounds that can be had of matrices of this size."""
    return weights if size <= DIRECT else weights[:ROUNDS_OF_FEW]


def _weighted(rows: Tensor, drawn: Tensor) -> Tensor:
    """Z with Z^T Z the covariance of the rows that were drawn, so often."""
    count = drawn.sum()
    centred = rows - drawn @ rows / count
    kept = drawn > 0
    return centred[kept] * (drawn[kept] / (count - 1)).sqrt()[:, None]


def _nuclear(rows: Tensor) -> Tensor:
    """The sum of the singular values of a matrix, from the smaller of its two squares."""
    square = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    return torch.linalg.eigvalsh(square).clamp(min=0).sqrt().sum()


def _influence(centred: Tensor, shift: Tensor, root: Tensor) -> Tensor:
    """The derivative of the distance by the weight of each row, N numbers of mean zero.

    With T = sigma_b^(1/2) (sigma_b^(1/2) sigma_a sigma_b^(1/2))^(-1/2) sigma_b^(1/2) that of the
    trace of the root is d^T T d / 2. centred: d of a [N, D]; shift: mu_a - mu_b; root: factor of
    sigma_b [D, R].
    """
    seen = centred @ root
    values, vectors = torch.linalg.eigh(seen.T @ seen / (len(centred) - 1))
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    moved = seen @ (vectors[:, kept] * values[kept] ** -0.25)
    found = 2 * centred @ shift + centred.square().sum(1) - moved.square().sum(1)
    return found - found.mean()


# ------------------------------------------------------------------ its limit


def least_for_limit(feature_size: int) -> int:
    """Images that the limit needs: every part has to have more images than features."""
    return PARTS[-1] * (feature_size + 1)


def limit(features: Tensor, other: Mapping[str, np.ndarray], seed: int = 0) -> float:
    """The distance that infinitely many images like these would have to fixed statistics.

    The bias is linear in one over the number of images: distances of halves and thirds of the set,
    each averaged over the parts, give the line, and where it ends is the limit. It may be negative.
    features: [N, D], N >= least_for_limit. Source: Chong and Forsyth 2020 (arXiv 1911.07023).
    """
    generator = torch.Generator().manual_seed(seed)
    shares, values = [], []
    for parts in PARTS:
        found = []
        for _ in range(PARTITIONS if parts > 1 else 1):
            order = torch.randperm(len(features), generator=generator)
            found += [distance(statistics(features[rows]), other) for rows in order.chunk(parts)]
        shares.append(parts / len(features))
        values.append(np.mean(found))
    return float(np.polyfit(shares, values, 1)[1])
