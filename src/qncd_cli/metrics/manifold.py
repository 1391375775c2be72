"""How far recall would move if other images had been drawn.

Recall counts the reference's images that lie among the samples, in balls around each that reach to
its third neighbour. Images that are drawn twice have neighbours at no distance, so that an ordinary
bootstrap shrinks the balls. Random halves of the samples, without repetition, do not: a number
taken from a half varies around its mean as much as that of the whole does around the truth (Politis
and Romano 1994, Annals of Statistics 22, 2031; Shao and Wu 1989, Annals of Statistics 17, 1176).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .bootstrap import ROUNDS
from .fidelity import PRC_NEIGHBORHOOD, PRC_ROWS_PER_BLOCK, distances

NEIGHBOURS = 24
"""Neighbours of a sample that are looked at; fewer than three of them are in a half once in 56,000
times. More: more memory."""
LEAST = 2 * (PRC_NEIGHBORHOOD + 1)
"""Samples whose halves have balls."""


def recall_replicates(
    reference: Tensor, samples: Tensor, rounds: int = ROUNDS, seed: int = 0
) -> np.ndarray:
    """Recall of random halves of the samples against a fixed reference, as far from its mean as
    recall of all would be.

    reference: features [M, D]; samples: [N, D]; seed: of the halves, which two sets of the same
    seeds share. Returns `rounds` numbers, none for fewer than LEAST samples.
    """
    count = len(samples)
    if count < LEAST or not rounds:
        return np.array([])
    half = count // 2
    radii = _radii(samples, _halves(count, rounds, seed))
    largest = radii.amax(0)
    rows, columns, lengths = [], [], []
    for start, part in enumerate(reference.split(PRC_ROWS_PER_BLOCK)):
        found = distances(part, samples)
        row, column = (found <= largest).nonzero(as_tuple=True)
        rows.append(row + start * PRC_ROWS_PER_BLOCK)
        columns.append(column)
        lengths.append(found[row, column])
    row, column, length = torch.cat(rows), torch.cat(columns), torch.cat(lengths)
    shares = []
    for radius in radii:
        inside = torch.zeros(len(reference), dtype=torch.bool)
        inside[row[length <= radius[column]]] = True
        shares.append(inside.double().mean().item())
    values = np.array(shares)
    return values.mean() + (values - values.mean()) * (half / (count - half)) ** 0.5


def _halves(count: int, rounds: int, seed: int) -> Tensor:
    """Which samples are in each half: bool [rounds, count]."""
    rng = np.random.default_rng(seed)
    kept = np.zeros((rounds, count), dtype=bool)
    for row in kept:
        row[rng.permutation(count)[: count // 2]] = True
    return torch.from_numpy(kept)


def _radii(samples: Tensor, halves: Tensor) -> Tensor:
    """The ball of each sample among those of each half: [rounds, N], -1 for others."""
    count = min(NEIGHBOURS, len(samples) - 1)
    lengths, neighbours = [], []
    for start, part in enumerate(samples.split(PRC_ROWS_PER_BLOCK)):
        found = distances(part, samples)
        rows = torch.arange(len(part))
        found[rows, rows + start * PRC_ROWS_PER_BLOCK] = torch.inf
        nearest = found.topk(count, largest=False, sorted=True)
        lengths.append(nearest.values)
        neighbours.append(nearest.indices)
    length, neighbour = torch.cat(lengths), torch.cat(neighbours)
    radii = []
    for half in halves:
        there = half[neighbour].cumsum(1) >= PRC_NEIGHBORHOOD  # [N, count]
        there[:, -1] = True  # the furthest that is known, where there are fewer
        third = there.int().argmax(1, keepdim=True)
        radii.append(torch.where(half, length.gather(1, third)[:, 0], -1.0))
    return torch.stack(radii)
