"""What is said of images before they are measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qncd_cli.metrics import frechet
from qncd_cli.metrics.checks import (
    frechet_bias,
    not_finite,
    notes_of_classes,
    notes_of_images,
    notes_of_reference,
)
from qncd_cli.metrics.networks import packaged
from qncd_cli.metrics.reference import Reference
from qncd_cli.metrics.seen import Seen


def images(count: int = 6, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def kinds(notes: list[dict]) -> list[str]:
    return [note["what"] for note in notes]


def test_one_pixel_is_enough_to_be_no_constant_image():
    some = torch.full((3, 3, 4, 4), 7, dtype=torch.uint8)
    some[1, 0, 0, 0] = 8
    some[2] = 0
    assert Seen.of(some).flat() == {0: (7, 7, 7), 2: (0, 0, 0)}
    latents = torch.zeros(3, 2, 2)
    latents[1, 1, 1] = float("inf")
    assert not_finite(latents) == {1: 1}


def test_black_constant_and_repeated_images_are_counted_and_the_first_is_named():
    some = images()
    assert notes_of_images("quantized", Seen.of(some), list("abcdef")) == []
    some[1], some[4], some[5] = 0, 9, some[2]
    found = notes_of_images("quantized", Seen.of(some), list("abcdef"))
    assert [note["says"] for note in found] == [
        "quantized: 1 of 6 images are black (first: b)",
        "quantized: 1 of 6 images are of one colour (first: e)",
        "quantized: 1 of 6 images repeat an earlier one (first: f, like c)",
    ]
    some[5, 0, 0, 0] ^= 1
    assert Seen.of(some).duplicates() == {}
    assert kinds(notes_of_images("images", Seen.of(images() // 128), list("abcdef"))) == [
        "pixel_range"
    ]


def test_classes_in_turn_are_balanced_and_others_are_not():
    assert notes_of_classes({"0": 2, "1": 1, "2": 1}) == []
    assert notes_of_classes({"0": 100, "1": 95}) == []
    (note,) = notes_of_classes({"0": 5, "1": 1, "2": 2})
    assert "5 images of class 0, 1 of class 1" in note["says"]


@pytest.mark.parametrize("count", [10, 60])
def test_the_bias_is_the_mean_distance_of_samples_to_their_own_distribution(count):
    """Also for fewer samples than features, where the covariance is singular."""
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(24, 24, generator=generator, dtype=torch.float64) / 5
    sigma = factor @ factor.T
    truth = {"mu": np.zeros(24), "sigma": sigma.numpy()}
    distances = [
        frechet.distance(
            frechet.statistics(
                torch.randn(count, 24, generator=generator, dtype=torch.float64) @ factor.T
            ),
            truth,
        )
        for _ in range(40)
    ]
    foreseen = np.mean([frechet_bias(sigma, count, seed) for seed in range(40)])
    assert foreseen == pytest.approx(np.mean(distances), rel=0.08)
    assert frechet_bias(sigma, count) == pytest.approx(foreseen, rel=0.5)
    assert frechet_bias(sigma, 20_000) < 0.05 * foreseen


def test_few_images_are_told_with_the_bias_to_expect_and_many_are_not():
    network = packaged()
    size = network.feature_size
    statistics = {"mu": np.zeros(size), "sigma": np.eye(size)}
    reference = Reference("r", statistics=statistics)
    (note,) = notes_of_reference(100, (8, 8), reference, network, ("fid",))
    bias = frechet_bias(torch.eye(size, dtype=torch.float64), 100)
    assert f"100 images are few for the {size} features" in note["says"]
    assert f"about {bias:.2f} away" in note["says"]
    assert notes_of_reference(5 * size, (8, 8), reference, network, ("fid",)) == []
    assert notes_of_reference(100, (8, 8), reference, network, ("isc",)) == []


def test_a_small_reference_of_another_size_with_black_images_is_told():
    held = images(6, 16)
    held[0] = 0
    found = notes_of_reference(9, (8, 8), Reference("r", images=held), packaged(), ("kid",))
    assert kinds(found) == ["too_few", "black", "sizes"]
    assert "images of 8x8 pixels, reference of 16x16" in found[-1]["says"]
