"""What an export is held against."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config

from qncd_cli.config.loading import parse_config
from qncd_cli.export import agreement
from qncd_cli.models.loading import load_model
from qncd_cli.progress import no_progress
from qncd_cli.runtime.denoiser import Denoiser, full_denoiser


class Shifted(Denoiser):
    """A denoiser that adds a number to what another one predicts."""

    def __init__(self, denoiser: Denoiser, shift: float):
        super().__init__(denoiser.module, denoiser.step)
        self.denoiser, self.shift = denoiser, shift

    def __call__(self, x, t, condition):
        return self.denoiser(x, t, condition) + self.shift


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.0), (0.25, 0.25), (float("nan"), None)])
def test_the_largest_difference_of_a_prediction_is_found(tiny_model, shift, expected):
    config = parse_config(tiny_config(tiny_model, sampling__steps=2), "test")
    model = load_model(config.model.source)
    full = full_denoiser(model)
    denoisers = {"one": full, "other": Shifted(full, shift)}
    found = agreement.measure(config, model, {"one": full}, "one", "one", 2, no_progress, "")
    assert found.difference == 0.0 and found.images["one"].shape[0] == 2
    if expected is None:
        with pytest.raises(Exception, match="not finite"):  # where it draws itself
            agreement.measure(config, model, denoisers, "one", "other", 2, no_progress, "")
        return
    found = agreement.measure(config, model, denoisers, "one", "other", 2, no_progress, "")
    assert found.difference == pytest.approx(expected, abs=1e-5)
    assert found.relative == pytest.approx(expected / found.prediction, abs=1e-5)
    assert torch.equal(*found.images.values()) == (expected == 0)
