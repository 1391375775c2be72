"""Sets looked at in parts, as ranks of a job do, or in another order: the same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from qncd_cli.metrics import kept_features, look
from qncd_cli.metrics.image import measure
from qncd_cli.metrics.images_on_disk import ImagesOnDisk
from qncd_cli.metrics.protocol import Protocol
from qncd_cli.metrics.reference import Reference

from .shared import gaussian, random_images, save_images

COUNT, SEED = 23, 7
METRICS = ("fid", "isc", "kid", "prc")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    """Several blocks for every rank, and nothing kept by the others."""
    monkeypatch.setenv("QNCD_CACHE", str(tmp_path / "cache"))
    for module in (kept_features, look):
        monkeypatch.setattr(module, "block_size", lambda _: 4)


def numbers(value: Any) -> list[float]:
    """All numbers of an entry of metrics.json, in their order."""
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    return [value] if isinstance(value, int | float) else []


def measured(found: look.Look, network) -> list[float]:
    reference = Reference("r", features=gaussian(0, 40, network.feature_size))
    assert found.features is not None
    entry = measure(found.features, reference, network, METRICS, seed=SEED).entry
    values = numbers(entry)
    assert len(values) > 20
    return values


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_parts_that_ranks_look_at_give_the_numbers_of_the_whole(tmp_path, network, ranks):
    names = [f"{seed:06d}.png" for seed in range(COUNT)]
    paths = [save_images(tmp_path / "images", random_images(3, COUNT)) / name for name in names]
    protocol, seeds = Protocol(METRICS, network, None, SEED), list(range(COUNT))
    alone = look.look_at(ImagesOnDisk(paths), protocol, seeds)
    parts = look.rows_of_parts(COUNT, ranks, network)
    assert sorted(row for part in parts for row in part) == seeds
    looks = []
    for part in parts:
        mine = ImagesOnDisk([paths[row] for row in part])
        value, tensors = look.look_at(mine, protocol, part).told()
        looks.append(look.Look.of(value, tensors))
    whole = look.joined(looks, parts)
    assert whole.seen.told() == alone.seen.told()
    assert measured(whole, network) == pytest.approx(measured(alone, network), rel=1e-9, abs=1e-9)


def test_images_in_another_order_give_the_same_numbers(network):
    images, order = random_images(3, COUNT), torch.randperm(COUNT).tolist()
    protocol = Protocol(METRICS, network, None, SEED)
    one = look.look_at(images, protocol, range(COUNT))
    other = look.look_at(images[order], replace(protocol), order)
    assert measured(other, network) == pytest.approx(measured(one, network), rel=1e-9, abs=1e-9)
