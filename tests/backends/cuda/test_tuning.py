"""Tiles that were timed, and the table that keeps them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qncd_cli.backends.cuda import product, tuning
from qncd_cli.backends.cuda.product import Product, multiply
from qncd_cli.backends.cuda.tiles import FLAT, INT8, PACKED, candidates
from qncd_cli.backends.cuda.tuning import TileTable, table_for
from qncd_cli.backends.cuda.weights import Weight

SHAPE = "4096 192 192 int8 float16"


class Clock:
    """Seconds of each tile; remembers which were asked for."""

    def __init__(self, fastest):
        self.fastest, self.asked = fastest, []

    def __call__(self, tile):
        self.asked.append(tile)
        return 1.0 if tile == self.fastest else 2.0


def test_the_fastest_tile_is_timed_once_and_kept_for_the_next_process(tmp_path):
    path, clock = tmp_path / "tiles" / "gpu.json", Clock(INT8[1])
    table = TileTable(path)
    assert table.fastest(SHAPE, INT8, clock) == INT8[1] and clock.asked == [*INT8]
    assert table.fastest(SHAPE, INT8, clock) == INT8[1] and len(clock.asked) == len(INT8)
    other = Clock(INT8[0])
    assert TileTable(path).fastest(SHAPE, INT8, other) == INT8[1] and not other.asked


def test_two_processes_keep_what_both_have_timed(tmp_path):
    path = tmp_path / "gpu.json"
    first, second = TileTable(path), TileTable(path)
    first.fastest("a", INT8, Clock(INT8[0]))
    second.fastest("b", INT8, Clock(INT8[2]))
    first.fastest("c", INT8, Clock(INT8[1]))
    late = TileTable(path)
    nobody = Clock(None)
    assert [late.fastest(s, INT8, nobody) for s in "abc"] == [INT8[0], INT8[2], INT8[1]]
    assert not nobody.asked


@pytest.mark.parametrize(
    "content", [b"", b"[1, 2]", b'{"4096 192 192 int8 float16": [1, 2]}', b'{"4096', b"\xff\xfe"]
)
def test_a_table_that_cannot_be_read_or_names_no_tile_is_timed_again(tmp_path, content):
    path, clock = tmp_path / "gpu.json", Clock(INT8[2])
    path.write_bytes(content)
    assert TileTable(path).fastest(SHAPE, INT8, clock) == INT8[2]
    assert TileTable(path).fastest(SHAPE, INT8, Clock(INT8[0])) == INT8[2]


def test_a_tile_that_is_shipped_no_more_is_timed_again(tmp_path):
    path, old = tmp_path / "gpu.json", replace(INT8[0], warps=16)
    TileTable(path).fastest(SHAPE, (old,), Clock(old))
    assert TileTable(path).fastest(SHAPE, INT8, Clock(INT8[1])) == INT8[1]


def test_where_nothing_can_be_written_every_process_times_for_itself(tmp_path):
    (tmp_path / "file").write_text("in the way of a folder")
    table = TileTable(tmp_path / "file" / "gpu.json")
    assert table.fastest(SHAPE, INT8, Clock(INT8[1])) == INT8[1]
    assert table.fastest(SHAPE, INT8, Clock(INT8[0])) == INT8[1]


def test_a_table_belongs_to_a_kind_of_gpu_and_a_version_of_triton(tmp_path, monkeypatch):
    monkeypatch.setenv("QNCD_CACHE", str(tmp_path))
    card = "NVIDIA GeForce RTX 4090"
    paths = [table_for(card, "3.8.0").path, table_for(card, "3.9.0").path]
    paths.append(table_for("NVIDIA H100 80GB HBM3/../x", "3.8.0").path)
    assert paths[0] == tmp_path / "tiles" / "NVIDIA-GeForce-RTX-4090-triton-3.8.0.json"
    assert len({*paths}) == 3 and {p.parent for p in paths} == {tmp_path / "tiles"}


def test_launches_are_timed_on_a_gpu_alone():
    assert not tuning.can_time(torch.device("cpu"))


@pytest.mark.parametrize("packed", [False, True])
def test_the_flat_tile_is_tried_for_few_rows(packed):
    tiles = PACKED if packed else INT8
    assert candidates(4096, packed) == tiles
    assert candidates(32, packed) == (*tiles, FLAT[packed])


def test_a_product_takes_the_tile_that_was_fastest_and_its_numbers_are_the_same(
    tmp_path, monkeypatch
):
    """On the interpreter, with a clock in the place of a GPU's."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (1, 5, 5, 64), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (70, 1, 64), generator=generator, dtype=torch.int8)
    sums = weight.int().sum(2).T.contiguous()
    made = Weight(weight, None, torch.full((70,), 1e-3), sums, input_scale_first=True)
    scale, zero_point = torch.tensor(0.5), torch.tensor(3, dtype=torch.int32)
    problem = Product(codes, made, None, scale, zero_point, [1, 1, 1, 1, 0, 0, 1, 1], torch.float32)
    by_arithmetic = multiply(problem)
    table, timed = TileTable(tmp_path / "gpu.json"), []

    def milliseconds(call, device):
        timed.append(call.constants["ROWS"])
        return abs(call.constants["ROWS"] - 128)  # the first of them

    for name, stand_in in (
        ("can_time", lambda device: True),
        ("table_of", lambda device: table),
        ("milliseconds", milliseconds),
    ):
        monkeypatch.setattr(product, name, stand_in)
    assert torch.equal(multiply(problem), by_arithmetic)
    assert timed == [tile.rows for tile in candidates(25, packed=False)]
    assert torch.equal(multiply(problem), by_arithmetic) and len(timed) == len(
        candidates(25, False)
    )
    other = replace(problem, dtype=torch.float16)
    assert torch.equal(multiply(other), by_arithmetic.half())
    assert len(timed) == 2 * len(candidates(25, False))  # a shape of its own
