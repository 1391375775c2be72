"""The Frechet distance against closed forms and an independent implementation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from qncd_cli.metrics import bootstrap, frechet

from .shared import gaussian


def test_frechet_statistics_match_numpy() -> None:
    features = gaussian(0, 40, 6)
    statistics = frechet.statistics(features)
    assert statistics["mu"].dtype == statistics["sigma"].dtype == np.float64
    np.testing.assert_allclose(statistics["mu"], features.double().numpy().mean(0), rtol=1e-12)
    centred = features.double().numpy() - statistics["mu"]
    np.testing.assert_allclose(statistics["sigma"], centred.T @ centred / 39, rtol=1e-9, atol=1e-12)


def test_frechet_distance_of_diagonal_gaussians() -> None:
    rng = np.random.default_rng(0)
    mu_a, mu_b = rng.normal(size=(2, 16))
    var_a, var_b = rng.uniform(0.1, 3, size=(2, 16))
    expected = ((mu_a - mu_b) ** 2).sum() + ((np.sqrt(var_a) - np.sqrt(var_b)) ** 2).sum()
    a = {"mu": mu_a, "sigma": np.diag(var_a)}
    b = {"mu": mu_b, "sigma": np.diag(var_b)}
    assert frechet.distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet.distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_a_shift_is_its_square() -> None:
    features = gaussian(1, 200, 12).double()
    a, b = (frechet.statistics(features + shift) for shift in (0.0, 0.5))
    assert frechet.distance(a, b) == pytest.approx(12 * 0.25, rel=1e-6)


def independent(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of two sets of features, its root as scipy computes it: ADM's, pytorch-fid's.

    A singular product has no root that scipy finds: there a root of each covariance by its singular
    values, whose product has the nuclear norm that is wanted.
    """
    mean = a.mean(0) - b.mean(0)
    one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    if min(len(a), len(b)) > a.shape[1]:
        root = np.trace(scipy.linalg.sqrtm(one @ two)).real
    else:
        halves = [x - x.mean(0) for x in (a, b)]
        scale = np.sqrt((len(a) - 1) * (len(b) - 1))
        root = scipy.linalg.svdvals(halves[0] @ halves[1].T).sum() / scale
    return mean @ mean + np.trace(one) + np.trace(two) - 2 * root


@pytest.mark.parametrize(
    ("rows", "others", "columns"), [(300, 200, 24), (40, 300, 64), (12, 20, 64), (2, 3, 16)]
)
def test_the_distance_is_scipys_also_for_singular_covariances(rows, others, columns):
    a = gaussian(0, rows, columns) * torch.linspace(0.01, 2, columns)
    b = gaussian(1, others, columns) + 0.1
    expected = independent(a.double().numpy(), b.double().numpy())
    found = frechet.distance(frechet.statistics(a), frechet.statistics(b))
    assert found == pytest.approx(expected, rel=1e-6)
    assert frechet.distance(frechet.statistics(a), frechet.statistics(a)) < 1e-6 * expected


def test_constant_and_repeated_features_have_a_distance_too():
    a = gaussian(0, 50, 12)
    a[:, 3], a[:, 5] = 0, a[:, 4]
    b = a @ torch.diag(torch.linspace(1, 2, 12))
    expected = independent(a[:10].double().numpy(), b[:10].double().numpy())
    found = frechet.distance(frechet.statistics(a[:10]), frechet.statistics(b[:10]))
    assert found == pytest.approx(expected, rel=1e-6)


# ---- replicates ---------------------------------------------------------------------------------


def test_a_replicate_is_the_distance_of_the_rows_that_were_drawn():
    """Both ways to compute it, with more and with fewer images than features."""
    for rows in (60, 9):
        a, b = gaussian(0, rows, 16), gaussian(1, rows, 16) * 1.5 + 0.3
        drawn, other = (bootstrap.weights(rows, 3, seed) for seed in (0, 1))
        known = frechet.statistics(gaussian(2, 40, 16))

        def taken(x, times):
            return frechet.statistics(x.repeat_interleave(times.long(), 0))

        against = [frechet.distance(taken(a, times), known) for times in drawn]
        assert frechet.replicates_to_statistics(a, known, drawn) == pytest.approx(against, rel=1e-6)
        apart = [
            frechet.distance(taken(a, one), taken(b, two))
            for one, two in zip(drawn, other, strict=True)
        ]
        found = frechet.replicates_to_features(a, b, drawn, other)
        assert found == pytest.approx(apart, rel=1e-6)


def test_the_derivative_stands_for_the_distance_where_images_are_many(monkeypatch):
    a = gaussian(0, 400, 8) * torch.linspace(0.2, 1, 8) + 0.2
    b = a + 0.3 * gaussian(1, 400, 8)
    known, drawn = frechet.statistics(gaussian(2, 300, 8)), bootstrap.weights(400, 60)
    direct = [
        frechet.replicates_to_statistics(a, known, drawn),
        frechet.replicates_to_features(a, b, drawn, drawn),
    ]
    monkeypatch.setattr(frechet, "DIRECT", 4)
    linear = [
        frechet.replicates_to_statistics(a, known, drawn),
        frechet.replicates_to_features(a, b, drawn, drawn),
    ]
    for one, two in zip(direct, linear, strict=True):
        assert two.std() == pytest.approx(one.std(), rel=0.1)
        assert np.corrcoef(one, two)[0, 1] > 0.95
    few = frechet.replicates_to_statistics(a[:20], known, bootstrap.weights(20))
    assert len(few) == frechet.ROUNDS_OF_FEW


def test_paired_replicates_vary_less_than_unpaired_ones():
    full = gaussian(0, 100, 8)
    quantized = full + 0.05 * gaussian(1, 100, 8) + 0.1
    drawn, other = bootstrap.weights(100), bootstrap.weights(100, seed=1)
    paired = frechet.replicates_to_features(full, quantized, drawn, drawn)
    apart = frechet.replicates_to_features(full, quantized, drawn, other)
    assert paired.std() < apart.std() / 2


def test_an_interval_covers_the_distance_of_the_distribution():
    """Of 200 sets of 200 Gaussian features, against known statistics: |shift|^2 is the truth."""
    known = {"mu": np.zeros(4), "sigma": np.eye(4)}
    truth, covered = 4 * 0.25, 0
    for seed in range(200):
        features = gaussian(seed, 200, 4) + 0.5
        value = frechet.distance(frechet.statistics(features), known)
        drawn = bootstrap.weights(200, seed=seed)
        found = frechet.replicates_to_statistics(features, known, drawn)
        low, high = bootstrap.interval(value, found)
        covered += low <= truth <= high
    assert 180 <= covered <= 198


# ---- the limit ----------------------------------------------------------------------------------


def test_the_limit_has_no_bias_and_its_interval_covers_the_truth():
    """Where the bias of the plain distance of 200 images is larger than half of the interval."""
    known = {"mu": np.zeros(16), "sigma": np.eye(16)}
    truth, covered, limits, plain = 16 * 0.0625, 0, [], []
    for seed in range(100):
        features = gaussian(seed, 200, 16) + 0.25
        limits.append(frechet.limit(features, known))
        plain.append(frechet.distance(frechet.statistics(features), known))
        drawn = bootstrap.weights(200, 50, seed)
        found = frechet.replicates_to_statistics(features, known, drawn)
        low, high = bootstrap.interval(limits[-1], found)
        covered += low <= truth <= high
    error = np.std(limits) / 10
    assert np.mean(plain) > truth + 10 * error
    assert abs(np.mean(limits) - truth) < 3 * error
    assert covered >= 88
