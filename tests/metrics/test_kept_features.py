"""Features are computed once for the same images and network, and what is lost is little."""

from __future__ import annotations

import os

import pytest
import torch

from qncd_cli.errors import ArtifactError
from qncd_cli.metrics import images_on_disk
from qncd_cli.metrics import kept_features as kept
from qncd_cli.metrics.fidelity import extract_features
from qncd_cli.metrics.image_files import image_paths
from qncd_cli.metrics.images_on_disk import ImagesOnDisk
from qncd_cli.metrics.seen import Seen
from qncd_cli.store.file_stamps import cache_folder

from .shared import random_images, save_images

SIZE = 4


@pytest.fixture(autouse=True)
def computed(monkeypatch, tmp_path, network) -> list[int]:
    """Numbers of images that were looked at, call by call; blocks are small, the cache is empty."""
    monkeypatch.setenv("QNCD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "block_size", lambda _: SIZE)
    calls: list[int] = []

    def extract(images, *arguments, **options):
        calls.append(len(images))
        return extract_features(images, *arguments, **options)

    monkeypatch.setattr(kept, "extract_features", extract)
    return calls


def on_disk(folder, images) -> ImagesOnDisk:
    return ImagesOnDisk(image_paths(save_images(folder, images)))


def same(found, expected) -> bool:
    pairs = zip(vars(found.in_order()).values(), vars(expected.in_order()).values(), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def blocks():
    return sorted((cache_folder() / "features").glob("*/*.safetensors"))


def test_a_second_look_computes_nothing_and_finds_the_same(tmp_path, network, computed):
    images = random_images(0, 10)
    expected = extract_features(images, network)
    stored = on_disk(tmp_path / "a", images)
    first, seen = kept.kept_features(stored, network)
    assert computed == [4, 4, 2]
    again, seen_again = kept.kept_features(on_disk(tmp_path / "elsewhere", images), network)
    assert computed == [4, 4, 2]
    assert same(first, expected) and same(again, expected)
    assert seen.told() == seen_again.told() == Seen.of(images).told()


def test_images_in_memory_are_kept_as_well_and_by_name(network, computed):
    images, names = random_images(1, 5), [3, 1, 2, 5, 4]
    expected = extract_features(images, network, names=names)
    for _ in range(2):
        assert same(kept.kept_features(images, network, names=names)[0], expected)
    assert computed == [4, 1]


def test_of_a_set_that_has_grown_only_what_is_new_is_computed(tmp_path, network, computed):
    images = random_images(2, 12)
    kept.kept_features(on_disk(tmp_path / "a", images[:8]), network)
    told: list[tuple[int, int]] = []

    def track(items, description, total, unit):
        for count, item in enumerate(items):
            told.append((count, total))
            yield item

    found, _ = kept.kept_features(on_disk(tmp_path / "a", images), network, track=track)
    assert computed == [4, 4, 4]
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]  # what is left is what has to be computed
    assert same(found, extract_features(images, network))


def test_one_other_pixel_or_another_network_is_computed_anew(
    tmp_path, network, inception, computed
):
    images = random_images(3, 8)
    kept.kept_features(images, network)
    images[5, 0, 0, 0] ^= 1
    found, _ = kept.kept_features(images, network)
    assert computed == [4, 4, 4]
    assert same(found, extract_features(images, network))
    kept.kept_features(images[:2], inception, spatial=True)
    kept.kept_features(images[:2], inception)
    assert computed == [4, 4, 4, 2, 2]


def test_a_stopped_look_goes_on_at_its_block(tmp_path, network, computed, monkeypatch):
    images, extract = random_images(4, 12), kept.extract_features

    def stopped(*arguments, **options):
        if len(computed) == 2:
            raise KeyboardInterrupt
        return extract(*arguments, **options)

    monkeypatch.setattr(kept, "extract_features", stopped)
    with pytest.raises(KeyboardInterrupt):
        kept.kept_features(images, network)
    monkeypatch.setattr(kept, "extract_features", extract)
    found, _ = kept.kept_features(images, network)
    assert computed == [4, 4, 4]
    assert same(found, extract_features(images, network))


def test_a_damaged_block_is_computed_again(network, computed):
    images = random_images(5, 4)
    expected, _ = kept.kept_features(images, network)
    (block,) = blocks()
    data = bytearray(block.read_bytes())
    data[-5] ^= 1
    block.write_bytes(data)
    found, _ = kept.kept_features(images, network)
    assert computed == [4, 4]
    assert same(found, expected)


def test_without_a_cache_nothing_is_kept(tmp_path, network, computed, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QNCD_CACHE", str(tmp_path / "file"))
    images = random_images(6, 4)
    for _ in range(2):
        found, _ = kept.kept_features(images, network)
        assert same(found, extract_features(images, network))
    assert computed == [4, 4]


def test_kept_images_of_another_size_are_refused_all_the_same(tmp_path, network):
    small = on_disk(tmp_path / "small", random_images(7, 4))
    kept.kept_features(small, network)
    mixed = save_images(tmp_path / "mixed", random_images(8, 4, size=40))
    for index, path in enumerate(small.paths):
        os.link(path, mixed / f"{index + 4:06d}.png")
    with pytest.raises(ArtifactError, match="000004.png: 32x32 pixels, but 000000.png has 40x40"):
        kept.kept_features(ImagesOnDisk(image_paths(mixed)), network)


def test_a_folder_that_was_found_sound_is_not_decoded_to_be_checked_again(tmp_path, monkeypatch):
    paths = image_paths(save_images(tmp_path / "a", random_images(0, 5)))
    calls: list[object] = []
    read = images_on_disk._read_image
    monkeypatch.setattr(images_on_disk, "_read_image", lambda p: calls.append(p) or read(p))
    for _ in range(2):
        assert len(images_on_disk.checked_images(paths)) == 5
    assert len(calls) == 5
    data = paths[3].read_bytes()
    paths[3].write_bytes(data[: len(data) // 2])
    for _ in range(2):
        with pytest.raises(ArtifactError, match="000003.png: not a readable image"):
            images_on_disk.checked_images(paths)
    skipped: list = []
    for _ in range(2):
        assert len(images_on_disk.checked_images(paths, skipped)) == 4
    assert skipped == [paths[3]] * 2
    paths[3].write_bytes(data)
    calls.clear()
    assert len(images_on_disk.checked_images(paths)) == 5
    assert not calls


def test_the_least_recently_used_make_room(network):
    images = random_images(9, 12)
    kept.kept_features(images, network)
    for age, block in enumerate(blocks()):
        os.utime(block, (1e9 - age, 1e9 - age))
    newest, *_ = blocks()
    kept._make_room(newest.stat().st_size + 1)
    assert blocks() == [newest]
