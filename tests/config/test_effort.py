"""What an effort stands for, and what it takes the place of."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import yaml
from conftest import refused

from qncd_cli.config.effort import EFFORTS
from qncd_cli.config.loading import load_config


@pytest.mark.parametrize("effort", EFFORTS)
def test_noise_is_measured_on_as_many_trajectories_as_there_are(minimal, effort):
    most = EFFORTS[effort].noise_trajectories
    for trajectories in (most // 2, most, 4 * most):
        said = [f"calibration.effort={effort}", f"calibration.trajectories={trajectories}"]
        config = load_config(minimal, said)
        assert config.calibration.noise_trajectories == min(trajectories, most)


def test_an_effort_says_how_many_trajectories_there_are(tmp_path):
    """One that is asked for takes the place of what the file says; one in the file does not."""
    path = tmp_path / "my.yaml"
    tree = {"model": {"source": "mine"}, "calibration": {"trajectories": 5, "effort": "quick"}}
    path.write_text(yaml.safe_dump(tree))
    assert load_config(str(path)).calibration.trajectories == 5
    for name, effort in EFFORTS.items():
        calibration = load_config(str(path), [f"calibration.effort={name}"]).calibration
        assert calibration.trajectories == effort.trajectories
        assert calibration.noise_trajectories == effort.noise_trajectories
        assert calibration.looks == effort
    both = load_config(str(path), ["calibration.effort=thorough", "calibration.trajectories=7"])
    assert (both.calibration.effort, both.calibration.trajectories) == ("thorough", 7)


@pytest.mark.parametrize(
    ("effort", "steps", "expected"),
    [
        ("standard", 4, 16),
        ("standard", 20, 16),
        ("standard", 25, 13),
        ("standard", 50, 12),
        ("standard", 1000, 12),
        ("quick", 20, 12),
        ("quick", 28, 12),
        ("thorough", 50, 64),
    ],
)
def test_a_longer_sampler_draws_fewer_trajectories(minimal, effort, steps, expected):
    """But not where they are asked for, have to do for several sizes or for more noise."""
    said = [f"calibration.effort={effort}", f"sampling.steps={steps}"]
    config = load_config(minimal, said)
    assert config.calibration.trajectories == expected
    assert config.calibration.noise_trajectories <= expected
    asked = load_config(minimal, [*said, "calibration.trajectories=11"])
    assert asked.calibration.trajectories == 11
    every = EFFORTS[effort].trajectories
    more = ["calibration.batch_size=2", "calibration.sizes=[[64, 64], [64, 32]]"]
    assert load_config(minimal, [*said, *more]).calibration.trajectories == every
    noisy = load_config(minimal, [*said, f"calibration.noise_trajectories={every}"])
    assert noisy.calibration.trajectories == every


def test_an_unknown_effort_names_the_known_ones(minimal):
    assert "'quick', 'standard' or 'thorough'" in refused(minimal, "calibration.effort=much")


def test_more_effort_looks_at_more_of_everything():
    for less, more in itertools.pairwise(EFFORTS.values()):
        pairs = zip(dataclasses.astuple(less), dataclasses.astuple(more), strict=True)
        assert all(b is None or a <= b for a, b in pairs)
        assert less != more
