"""Numbers of pairs: their intervals, what changed, and classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qncd_cli.metrics import bootstrap, image, spread

from .shared import gaussian, random_images

ALL = ("fid", "isc", "kid", "prc")


def pairs(count: int = 40, size: int = 16) -> dict:
    images = random_images(0, count, size=size) // 2 + 60
    noise = random_images(1, count, size=size) // (4 + torch.arange(count)[:, None, None, None])
    latents = gaussian(2, count, 12).reshape(count, 3, 2, 2)
    noisy = latents + 0.1 * gaussian(3, count, 12).reshape(count, 3, 2, 2)
    return {"images": (images, images + noise.to(torch.uint8)), "latents": (latents, noisy)}


def measured(seeds: list[int], classes: list[int], seen: dict | None = None, **more) -> dict:
    found = spread.Pairs.of(**{**pairs(len(seeds)), **more})
    return spread.of_pairs(seeds, classes, found, seen or {}, 1, {"cvvdp_jod": None})


def test_every_pooled_number_has_its_spread_and_an_interval_around_it():
    found = measured(list(range(40)), [0, 1] * 20)
    for key, bounds in found["intervals"].items():
        assert bounds["low"] <= found[key] <= bounds["high"], key
    assert set(found["intervals"]) >= {"psnr_db", "sqnr_latents_db", "ssim", "changed"}
    assert found["intervals"]["psnr_db"]["low"] < found["intervals"]["psnr_db"]["high"]
    worst = sorted(range(40), key=lambda seed: found["per_seed"]["psnr_db"][str(seed)])
    assert found["worst_seeds"] == worst[: spread.WORST]
    assert found["ssim_q05"] < found["ssim_median"]
    assert found["cvvdp_jod"] is None and "cvvdp_jod" not in found["intervals"]
    assert found["ssim"] == pytest.approx(np.mean(list(found["per_seed"]["ssim"].values())))


def test_an_interval_of_pooled_psnr_covers_the_truth():
    """The pooled number of very many pairs, whose errors have a tail."""
    rng = np.random.default_rng(0)

    def errors(count: int) -> np.ndarray:
        return rng.gamma(2, 1e-3, size=count)

    truth, covered = -10 * np.log10(2e-3), 0
    for seed in range(200):
        psnr = (-10 * np.log10(errors(100))).tolist()
        drawn = bootstrap.weights(100, 50, seed)
        found = spread.intervals(psnr, psnr, [1.0] * 100, {}, drawn)
        covered += all(
            found[key]["low"] <= truth <= found[key]["high"]
            for key in ("psnr_db", "sqnr_latents_db")
        )
    assert 180 <= covered <= 198


def test_no_interval_is_wider_than_the_pairs_are():
    """A few bad ones of few decide a quantile, and the bootstrap moves it by more than is there."""
    ssim = [0.999] * 60 + [0.5] * 4
    psnr = [45.0] * 60 + [12.0] * 4
    drawn = bootstrap.weights(64, 100, 0)
    found = spread.intervals(psnr, psnr, [1.0] * 64, {"ssim": ssim}, drawn)
    for key, bounds in found.items():
        most = {"s": 0.999 if key.startswith("ssim") else 45.0, "p": 45.0, "c": 64.0}[key[0]]
        least = {"s": 0.5 if key.startswith("ssim") else 12.0, "p": 12.0, "c": 0.0}[key[0]]
        assert least <= bounds["low"] <= bounds["high"] <= most, key


def test_equal_pairs_have_no_interval_to_show():
    same = pairs()["images"][0]
    found = measured(list(range(40)), [0] * 40, images=(same, same))
    bounds = found["intervals"]["psnr_db"]
    assert bounds["low"] == bounds["high"]
    assert measured([3], [0])["intervals"]["psnr_db"].keys() == {"low", "high"}


def test_small_images_have_no_ssim():
    small = tuple(random_images(i, 4, size=8) for i in (0, 1))
    found = measured([0, 1, 2, 3], [0] * 4, images=small)
    assert found["ssim"] is found["ssim_median"] is None and "ssim" not in found["per_seed"]


def test_classes_are_told_apart():
    found = measured([5, 6, 7, 8], [2, 9, 2, 2], {"full": [2, 9, 2, 1], "quantized": [2, 1, 2, 2]})
    assert list(found["by_class"]) == ["2", "9"]
    two, nine = found["by_class"]["2"], found["by_class"]["9"]
    assert (two["num_samples"], nine["num_samples"]) == (3, 1)
    assert two["class_agreement_full"] == pytest.approx(2 / 3)
    assert (two["class_agreement_quantized"], nine["class_agreement_quantized"]) == (1, 0)
    assert nine["psnr_median_db"] == found["per_seed"]["psnr_db"]["6"]
    assert sum(entry["changed"] for entry in found["by_class"].values()) == found["changed"]


def test_a_change_on_shared_seeds_is_surer_than_either_number(network):
    full, _ = pairs(60)["images"]
    quantized = (full // 8 * 8 + 3).to(torch.uint8)
    reference = image.load_reference(random_images(7, 60, size=16))
    # rows in the order of contents: names keep the pairs together
    names = list(range(60))
    one, other = (image.measure(x, reference, network, ALL, names=names) for x in (full, quantized))
    found = spread.changes(one.entry, other.entry, one.replicates, other.replicates)
    assert set(found) >= {"feature_distance", "kernel_distance", "class_score", "precision"}
    for key in ("feature_distance", "kernel_distance"):
        before, after = one.entry[key], other.entry[key]
        change = found[key]
        assert change["value"] == pytest.approx(after["value"] - before["value"])
        assert change["low"] <= change["value"] <= change["high"]
        apart = np.hypot(*(entry["high"] - entry["low"] for entry in (before, after)))
        assert change["high"] - change["low"] < 0.7 * apart
