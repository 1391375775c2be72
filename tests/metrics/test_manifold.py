"""Recall's interval: halves of the samples cover the truth, and are what they are said to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qncd_cli.metrics import bootstrap, fidelity, manifold

from .shared import gaussian


def recall(reference: torch.Tensor, samples: torch.Tensor) -> float:
    return fidelity.within(reference, samples).double().mean().item()


def test_the_interval_of_recall_covers_the_truth():
    """What sets of 100 samples recall of a fixed reference on average."""
    reference = gaussian(10_002, 100, 2)
    values, intervals = [], []
    for seed in range(200):
        samples = 0.7 * gaussian(20_000 + seed, 100, 2)
        values.append(recall(reference, samples))
        found = manifold.recall_replicates(reference, samples, 60, seed)
        intervals.append(bootstrap.interval(values[-1], found, (0, 1)))
    covered = np.mean([low <= np.mean(values) <= high for low, high in intervals])
    assert 0.90 <= covered <= 0.99


@pytest.mark.parametrize("count", [8, 9, 40])
def test_a_replicate_is_the_recall_of_a_half(count, monkeypatch):
    monkeypatch.setattr(manifold, "PRC_ROWS_PER_BLOCK", 7)
    reference, samples = gaussian(1, 30, 2), gaussian(2, count, 2)
    halves = manifold._halves(count, 5, 3)
    assert halves.sum(1).tolist() == [count // 2] * 5
    assert len({tuple(half.tolist()) for half in halves}) > 1
    expected = np.array([recall(reference, samples[half]) for half in halves])
    scale = (count // 2 / (count - count // 2)) ** 0.5
    found = manifold.recall_replicates(reference, samples, 5, 3)
    assert found == pytest.approx(expected.mean() + scale * (expected - expected.mean()))


def test_too_few_samples_or_no_rounds_have_none():
    reference = gaussian(1, 30, 2)
    assert len(manifold.recall_replicates(reference, gaussian(2, 7, 2))) == 0
    assert len(manifold.recall_replicates(reference, gaussian(2, 9, 2), 0)) == 0
