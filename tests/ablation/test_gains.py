"""Gains over the first row: what they say, and that pairing narrows their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from qncd_cli.ablation.gains import median_gain, with_gains
from qncd_cli.ablation.variants import GROUPS, INTER, named, variants


def by_seed(values) -> dict[str, float]:
    return {str(seed): float(value) for seed, value in enumerate(values)}


def row(preset: str, widths: tuple[int, int], values) -> dict:
    sqnr = {"sqnr_db": by_seed(values)}
    return {"preset": preset, "weights": widths[0], "activations": widths[1], "per_seed": sqnr}


def test_a_constant_gain_is_found_whatever_the_seeds_are_like():
    hard = np.random.default_rng(0).normal(20, 6, 200)
    gain = median_gain(by_seed(hard), by_seed(hard + 1.5))
    assert gain == pytest.approx({"value": 1.5, "low": 1.5, "high": 1.5})


def test_the_interval_is_narrower_than_that_of_unpaired_rows_and_covers_the_truth():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        hard = rng.normal(20, 6, 100)
        gain = median_gain(by_seed(hard), by_seed(hard + rng.normal(0.5, 1, 100)))
        assert gain["high"] - gain["low"] < 1.0  # a median of 100 such seeds alone: about 3 dB
        covered += gain["low"] <= 0.5 <= gain["high"]
    assert 88 <= covered <= 100


def test_every_row_is_compared_with_the_first_of_its_widths():
    rows = [
        row("a", (4, 8), [10, 20]),
        row("b", (4, 8), [11, 21]),
        row("a", (4, 6), [5, 6]),
        row("b", (4, 6), [3, 4]),
    ]
    gains = [found["sqnr_gain_db"] for found in with_gains(rows)]
    assert gains[0] is None
    assert gains[2] is None
    assert gains[1]["value"] == 1
    assert gains[3]["value"] == -2
    assert "sqnr_gain_db" not in rows[1]


def test_seeds_that_one_row_lacks_do_not_count():
    assert median_gain(by_seed([1, 2, 3]), {"1": 4.0, "9": 100.0})["value"] == 2
    assert median_gain(by_seed([1]), {"9": 100.0}) is None


def test_a_group_stands_for_its_rows():
    assert named(["minmax", "corrections"]) == ["minmax", *GROUPS["corrections"]]
    rows = variants("fashion_ldm", named(["corrections"]), ["w4a6"], [])
    assert [r.name for r in rows] == list(GROUPS["corrections"])


def test_the_corrections_stand_on_qdiffusion_and_on_best_each_with_its_settings():
    rows = {row.name: row.config for row in variants("fashion_ldm", GROUPS["corrections"], [], [])}
    on = {"qdiffusion": "qncd-inter", "best": "best+published"}
    for base, published in on.items():
        inter = {name: rows[f"{base}+{name}"].correction.inter for name in INTER if name != "ptqd"}
        assert {name: i.method for name, i in inter.items()} == {
            **{name: name for name in ("runtime", "affine", "stepwise")},
            "stepwise+flat": "stepwise",
        }
        assert (inter["stepwise+flat"].field, inter["stepwise"].field) == (1, 8)
        assert rows[published].correction.inter == rows["qncd-inter"].correction.inter
        assert rows[published].quantization.weights == rows[base].quantization.weights
    assert rows["qncd"].correction.intra == rows["best+embedding+published"].correction.intra


def test_a_published_estimate_falls_into_short_samplers():
    (row,) = variants("fashion_ldm", ["best+published"], [], ["sampling.steps=4"])
    assert row.config.correction.inter.first == 2
