"""The noise that the run-time estimator adds: plain, balanced and antithetic."""

from __future__ import annotations

import pytest
import torch
from analytic import SEEDS, gaussian, runtime, sample

from qncd_cli.errors import ConfigError


def readings(noise, predict, seeds=range(40)):
    """Mean reading of every sample and step [M, C], and the estimator."""
    estimator = runtime(seeds, interval=1, apply=False, target="injected", noise=noise)
    sample(predict, estimator, seeds)
    return torch.cat([e.mean for e in estimator.estimates]), estimator


@pytest.mark.parametrize("noise", ["balanced", "antithetic"])
def test_chance_is_less_than_of_plain_noise(noise):
    full = gaussian(0.8)
    plain, found = (readings(name, full)[0].var(0).mean() for name in ("plain", noise))
    assert found < 0.75 * plain


@pytest.mark.parametrize("noise", ["plain", "balanced", "antithetic"])
def test_a_shift_is_read_alike(noise):
    full, shifted = gaussian(0.8), gaussian(0.8, bias=0.1)
    excess, plain = (
        float(readings(name, shifted)[0].mean() - readings(name, full)[0].mean())
        for name in (noise, "plain")
    )
    assert excess == pytest.approx(plain, rel=0.1)


def test_antithetic_pairs_take_two_calls_and_the_others_one():
    calls = {
        name: readings(name, gaussian(0.8), SEEDS)[1].extra_calls for name in ("plain", "balanced")
    }
    assert calls["plain"] == calls["balanced"]
    assert readings("antithetic", gaussian(0.8), SEEDS)[1].extra_calls == 2 * calls["plain"]


def test_balanced_noise_has_the_mean_zero_in_every_channel():
    estimator = runtime(SEEDS, noise="balanced")
    z = estimator._draw(torch.zeros(3, 4, 6, 6))
    assert z.flatten(2).mean(2).abs().max() < 1e-6
    assert z.std() == pytest.approx(1, rel=0.2)


def test_an_unknown_noise_is_refused():
    with pytest.raises(ConfigError, match="unknown noise 'pink'"):
        runtime(noise="pink")
