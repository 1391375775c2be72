"""Intervals: how often they cover the truth, and that pairing narrows them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qncd_cli.metrics import bootstrap, fidelity

from .shared import gaussian

SETS = range(200)


def covered(truth: float, intervals: list[tuple[float, float]]) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_the_interval_of_a_kernel_distance_covers_the_truth():
    """The kernel's mean over pairs of two Gaussians, from many more images."""
    reference = gaussian(10_000, 2000, 4)
    many = gaussian(10_001, 4000, 4) + 0.4
    fixed = reference.double()

    def mean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / 4 + 1) ** 3

    own = mean(many.double(), many.double())
    within = (own.sum() - own.trace()) / (4000 * 3999)
    its = mean(fixed, fixed)
    rest = (its.sum() - its.trace()) / (2000 * 1999)
    truth = float(within + rest - 2 * mean(many.double(), fixed).mean())
    intervals = []
    for seed in SETS:
        some = gaussian(seed, 60, 4) + 0.4
        a = some.double()
        own, across = mean(a, a), mean(a, fixed).mean()
        value = float((own.sum() - own.trace()) / (60 * 59) + rest - 2 * across)
        found = bootstrap.of_kernel_distance(some, reference, bootstrap.weights(60, 60, seed))
        intervals.append(bootstrap.interval(value, found))
    assert 0.90 <= covered(truth, intervals) <= 0.99


def test_the_interval_of_a_class_score_covers_the_truth():
    """What sets of 100 images score on average: the score is of sets of this size."""
    logits = [3 * gaussian(seed, 100, 6) for seed in SETS]
    values = [fidelity.class_score(rows)["value"] for rows in logits]
    intervals = [
        bootstrap.interval(
            value, fidelity.class_score_replicates(rows, bootstrap.weights(100, 60, seed))
        )
        for seed, (rows, value) in enumerate(zip(logits, values, strict=True))
    ]
    assert 0.90 <= covered(float(np.mean(values)), intervals) <= 0.99


def test_the_interval_of_precision_covers_the_truth():
    reference = gaussian(10_000, 100, 2)
    truth = fidelity.within(1.5 * gaussian(10_001, 20_000, 2), reference).double().mean().item()
    intervals = []
    for seed in SETS:
        inside = fidelity.within(1.5 * gaussian(seed, 100, 2), reference)
        found = bootstrap.of_shares(inside, bootstrap.weights(100, 100, seed))
        intervals.append(bootstrap.interval(inside.double().mean().item(), found, (0, 1)))
    assert 0.90 <= covered(truth, intervals) <= 0.99


def test_the_interval_of_a_median_covers_the_truth():
    intervals = []
    for seed in SETS:
        values = np.random.default_rng(seed).gamma(4, 5, size=100)
        found = bootstrap.of_statistic(np.median, values, bootstrap.weights(100, 100, seed))
        intervals.append(bootstrap.interval(float(np.median(values)), found))
    truth = float(np.median(np.random.default_rng(999).gamma(4, 5, size=400_000)))
    assert 0.90 <= covered(truth, intervals) <= 0.99


def test_a_replicate_is_the_number_of_the_rows_that_were_drawn():
    logits, drawn = gaussian(0, 40, 5), bootstrap.weights(40, 4)
    found = bootstrap.of_class_score(logits, drawn, 1)
    for times, ours in zip(drawn, found, strict=True):
        rows = logits.repeat_interleave(times.long(), 0)
        p = rows.double().softmax(1)
        score = (p * (p / p.mean(0)).log()).sum(1).mean().exp()
        assert ours == pytest.approx(score.item(), rel=1e-9)
    a, b = gaussian(1, 20, 3), gaussian(2, 30, 3)
    times = torch.zeros(2, 20, dtype=torch.float64)
    times[0], times[1, :10] = 1, 2
    found = bootstrap.of_kernel_distance(a, b, times)
    k = (a.double() @ a.double().T / 3 + 1) ** 3
    kernel = [((x.sum() - x.trace()) / (len(x) * (len(x) - 1))).item() for x in (k, k[:10, :10])]
    cross = ((a.double() @ b.double().T / 3 + 1) ** 3).mean(1)
    both = [one - 2 * c.mean().item() for one, c in zip(kernel, (cross, cross[:10]), strict=True)]
    assert found[0] - found[1] == pytest.approx(both[0] - both[1], rel=1e-9)


def test_no_replicates_and_infinite_ones_have_no_interval():
    assert bootstrap.interval(1.0, np.array([])) == (None, None)
    assert bootstrap.interval(1.0, np.array([1.0, math.inf])) == (None, None)
    low, high = bootstrap.interval(0.5, np.linspace(0, 2, 40), (0, 1))
    assert (low, high) == (0, 1)
