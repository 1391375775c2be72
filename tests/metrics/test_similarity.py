"""SSIM against an independent implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from qncd_cli.metrics.similarity import ssim_each

from .shared import random_images


def independent(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """By scipy's Gaussian filter of 11 taps, where no tap lies outside of the image."""

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=3.4, axes=(2, 3))[..., 5:-5, 5:-5]

    one, two = 2.55**2, 7.65**2
    spread = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2
    both = 2 * (mean(a * b) - mean(a) * mean(b)) + two
    light = (2 * mean(a) * mean(b) + one) / (mean(a) ** 2 + mean(b) ** 2 + one)
    return (light * both / (spread + two)).mean(axis=(1, 2, 3))


@pytest.mark.parametrize("size", [11, 24])
def test_ssim_is_that_of_an_independent_implementation(size):
    images = random_images(0, 5, size=size)
    other = images // 2 + random_images(1, 5, size=size) // 8
    expected = independent(images.double().numpy(), other.double().numpy())
    assert ssim_each(images, other) == pytest.approx(expected.tolist(), rel=1e-9)


def test_equal_images_are_1_and_grey_ones_need_one_channel():
    images = random_images(0, 3, size=16)
    assert ssim_each(images, images) == pytest.approx([1] * 3)
    grey, other = images[:, :1], images[:, 1:2]
    wide = [x.expand(-1, 3, -1, -1) for x in (grey, other)]
    assert ssim_each(grey, other) == pytest.approx(ssim_each(*wide), rel=1e-12)
    assert max(ssim_each(grey, other)) < 0.5


def test_images_smaller_than_the_window_have_none():
    assert ssim_each(random_images(0, 2, size=10), random_images(1, 2, size=10)) is None
    with pytest.raises(ValueError, match="differ"):
        ssim_each(random_images(0, 2), random_images(0, 3))
    flat = torch.full((1, 3, 16, 16), 9, dtype=torch.uint8)
    assert ssim_each(flat, flat) == pytest.approx([1.0])
