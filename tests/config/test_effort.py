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


def test_an_unknown_effort_names_the_known_ones(minimal):
    assert "'quick', 'standard' or 'thorough'" in refused(minimal, "calibration.effort=much")


def test_more_effort_looks_at_more_of_everything():
    for less, more in itertools.pairwise(EFFORTS.values()):
        pairs = zip(dataclasses.astuple(less), dataclasses.astuple(more), strict=True)
        assert all(a <= b for a, b in pairs)
        assert less != more
