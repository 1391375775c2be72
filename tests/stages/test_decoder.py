"""What is said of a decoder in integers."""

from __future__ import annotations

import torch

from qncd_cli.stages.decoder import note_of_decoder, spread_of


def test_psnr_is_that_of_the_definition_over_all_images():
    """60 images, of which image i differs by 1 + i % 2 in every pixel."""
    errors = (1.0 + torch.arange(60, dtype=torch.float64) % 2).square()
    found = spread_of(errors)
    assert abs(found["psnr_db"] - 44.15) < 0.01  # 10 log10(255^2 / 2.5)
    assert abs(found["psnr_q05_db"] - 42.11) < 0.01  # 10 log10(255^2 / 4)
    assert abs(found["psnr_median_db"] - (42.11 + 48.13) / 2) < 0.01
    note = note_of_decoder({**found, "num_samples": 60})
    assert note["count"] == 60 and "pooled 44.15" in note["says"]


def test_the_same_images_are_called_identical():
    found = spread_of(torch.zeros(3, dtype=torch.float64))
    says = note_of_decoder({**found, "num_samples": 3})["says"]
    assert says.endswith("median identical, pooled identical, 5 % quantile identical")
