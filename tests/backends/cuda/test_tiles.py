"""Which tile a product takes."""

from __future__ import annotations

import pytest

from qncd_cli.backends.cuda.tiles import FLAT, INT8, PACKED, WIDE, choose_tile, efficiency, tiles_of


@pytest.mark.parametrize("packed", [False, True])
def test_tiles_shrink_until_every_multiprocessor_has_one(packed):
    tiles = PACKED if packed else INT8
    assert choose_tile(32768, 192, packed, 108) == tiles[0]
    assert choose_tile(8192, 192, packed, 108) == tiles[0]
    assert choose_tile(4096, 192, packed, 90) == tiles[1]
    assert choose_tile(1024, 192, packed, 108) == tiles[2]
    assert choose_tile(17, 8, packed, 108) == tiles[2]
    assert choose_tile(16, 960, packed, 108) == FLAT[packed]


@pytest.mark.parametrize("packed", [False, True])
def test_inputs_in_floating_point_have_tiles_of_their_own(packed):
    tiles = tiles_of(packed, 16)
    assert choose_tile(32768, 192, packed, 108, 16) == tiles[0]
    assert choose_tile(17, 8, packed, 108, 16) == tiles[-1]
    assert choose_tile(16, 960, packed, 108, 16) == FLAT[packed]
    assert choose_tile(16, 960, packed, 108, 32) == choose_tile(32768, 192, packed, 1, 32) == WIDE


def test_packed_tiles_read_as_many_channels():
    both = [*zip(INT8, PACKED, strict=True), FLAT]
    assert all(plain.depth == 2 * packed.depth for plain, packed in both)


def test_efficiency_counts_what_is_filled_up():
    tile = INT8[0]
    assert efficiency(128 * 10, 128 * 2, 64, tile, 20) == 1
    assert efficiency(128 * 10, 128 * 2, 64, tile, 40) == 0.5
    assert efficiency(64, 64, 32, tile, 1) == pytest.approx(1 / 8)
