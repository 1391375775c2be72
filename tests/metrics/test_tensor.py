"""Decibels against direct computation in numpy, and their edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qncd_cli.metrics.tensor import (
    deviation_steps,
    psnr_db,
    psnr_each_db,
    sqnr_db,
    sqnr_steps_db,
)


def _images(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_sqnr_of_a_known_ratio() -> None:
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert sqnr_db(reference, reference * 0.9) == pytest.approx(20.0, abs=1e-6)
    assert sqnr_db(reference, torch.zeros(2)) == pytest.approx(0.0, abs=1e-12)


def test_sqnr_matches_numpy_and_ignores_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(5, 7, generator=generator)
    noisy = reference + 0.1 * torch.randn(5, 7, generator=generator)
    a, b = reference.double().numpy(), noisy.double().numpy()
    expected = 10 * np.log10((a**2).sum() / ((a - b) ** 2).sum())
    assert sqnr_db(reference, noisy) == pytest.approx(expected, rel=1e-12)
    assert sqnr_db(reference * 4, noisy * 4) == pytest.approx(expected, rel=1e-12)


def test_sqnr_is_computed_in_float64() -> None:
    reference = torch.full((1000,), 60000.0, dtype=torch.float16)  # its square overflows float16
    noisy = reference.clone()
    noisy[0] = 59968.0
    expected = 10 * math.log10(1000 * 60000.0**2 / 32.0**2)
    assert reference[0].item() == 60000.0
    assert sqnr_db(reference, noisy) == pytest.approx(expected, rel=1e-9)


def test_sqnr_edges() -> None:
    x, zero = torch.ones(3), torch.zeros(3)
    assert sqnr_db(x, x.clone()) == math.inf
    assert sqnr_db(zero, zero) == math.inf
    assert sqnr_db(zero, x) == -math.inf
    assert math.isnan(sqnr_db(x, torch.tensor([1.0, math.nan, 1.0])))


def test_sqnr_steps_is_sqnr_of_each_step() -> None:
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(3, 4, 2, 5, generator=generator)
    noisy = reference + 0.05 * torch.randn(3, 4, 2, 5, generator=generator)
    noisy[:, 2] = reference[:, 2]
    steps = sqnr_steps_db(reference, noisy)
    assert steps == [sqnr_db(reference[:, i], noisy[:, i]) for i in range(4)]
    assert steps[2] == math.inf and all(map(math.isfinite, steps[:2] + steps[3:]))


def test_a_deviation_is_a_mean_and_a_spread_of_each_step() -> None:
    """A shift of each channel, and noise of a known size that is the same in both directions."""
    reference = torch.randn(3, 2, 2, 4, 5, generator=torch.Generator().manual_seed(1))
    noise = torch.ones(4, 5).reshape(-1)
    noise[::2] = -1
    noisy = reference.clone()
    noisy[:, 1] += torch.tensor([3.0, 4.0])[:, None, None] + 0.5 * noise.reshape(4, 5)
    found = deviation_steps(reference, noisy)
    assert found["mean"] == pytest.approx([0, (25 / 2) ** 0.5], rel=1e-6)
    assert found["spread"] == pytest.approx([0, 0.5], rel=1e-6)
    with pytest.raises(ValueError, match="samples, steps, channels"):
        deviation_steps(torch.ones(3, 2), torch.ones(3, 2))


def test_psnr_matches_numpy() -> None:
    a, b = _images(0, 70, 3, 8, 6), _images(1, 70, 3, 8, 6)
    difference = a.numpy().astype(np.float64) - b.numpy()
    assert psnr_db(a, b) == pytest.approx(10 * np.log10(255**2 / (difference**2).mean()))
    each = 10 * np.log10(255**2 / (difference**2).mean(axis=(1, 2, 3)))
    assert psnr_each_db(a, b) == pytest.approx(each.tolist())


def test_psnr_of_black_and_white_and_of_identical_images() -> None:
    black = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    white = torch.full_like(black, 255)
    assert psnr_db(black, white) == 0.0  # unsigned subtraction would wrap around
    assert psnr_db(white, white) == math.inf
    assert psnr_each_db(black, torch.stack([black[0], white[0]])) == [math.inf, 0.0]


@pytest.mark.parametrize("metric", [sqnr_db, sqnr_steps_db, psnr_db, psnr_each_db])
def test_shape_mismatch_names_both_shapes(metric) -> None:
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\] against \[2, 3, 4, 5\]"):
        metric(_images(0, 2, 3, 4, 4), _images(0, 2, 3, 4, 5))
    with pytest.raises(ValueError, match="nothing to compare"):
        metric(_images(0, 0, 3, 4, 4), _images(0, 0, 3, 4, 4))


def test_wrong_dtype_and_dimensions() -> None:
    with pytest.raises(ValueError, match="uint8"):
        psnr_db(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        psnr_db(_images(0, 3, 4, 4), _images(0, 3, 4, 4))
    with pytest.raises(ValueError, match="samples, steps"):
        sqnr_steps_db(torch.ones(3), torch.ones(3))
