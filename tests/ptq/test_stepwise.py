"""Trajectories in full precision that a correction is fitted on."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config

from qncd_cli.config.loading import parse_config
from qncd_cli.models.loading import load_model
from qncd_cli.progress import no_progress
from qncd_cli.ptq.stepwise import goals_for
from qncd_cli.runtime.denoiser import full_denoiser
from qncd_cli.stages import calibrate

COUNT = 5


def refused(x, t, condition):
    raise AssertionError("no call is to be made")


@pytest.mark.parametrize(
    "sampling",
    [
        {"guidance_scale": 2.0},
        {"eta": 1.0},
        {"scheduler": "dpmsolver++"},
        {"scheduler": "euler"},
    ],
    ids=str,
)
def test_calibrations_trajectories_are_those_that_would_be_drawn(tiny_model, sampling):
    counts = {"trajectories": COUNT, "noise_trajectories": COUNT, "batch_size": 2}
    changes = {f"sampling__{key}": value for key, value in sampling.items()}
    tree = tiny_config(tiny_model, calibration=counts, sampling__steps=4, **changes)
    config, model = parse_config(tree, "test"), load_model(str(tiny_model))
    calibration, _ = calibrate.run(config, model)
    denoiser = full_denoiser(model)
    drawn, seeds = goals_for(config, model, None, denoiser, no_progress)
    taken, same = goals_for(config, model, calibration, refused, no_progress)
    assert seeds == same and len(seeds) == COUNT
    assert drawn.shape == (4, COUNT, *model.latent_shape)
    assert torch.equal(taken, drawn)
    some, first = goals_for(config, model, calibration, refused, no_progress, most=2)
    assert first == seeds[:2] and torch.equal(some, drawn[:, :2])


def test_of_several_sizes_those_of_samplings_own_are_taken(tiny_model):
    counts = {"trajectories": 6, "noise_trajectories": 2, "batch_size": 2, "sizes": [[16, 16]]}
    tree = tiny_config(tiny_model, calibration=counts, sampling__steps=2)
    config = parse_config(tree, "test")
    model = load_model(str(tiny_model), sizes=config.calibration.sizes)
    calibration, _ = calibrate.run(config, model)
    goals, seeds = goals_for(config, model, calibration, refused, no_progress)
    first = config.calibration.seed
    assert seeds == [first, first + 1, first + 4, first + 5]
    assert goals.shape == (2, 4, *model.latent_shape)
