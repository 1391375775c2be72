"""Shards of a sample set: every seed once, in the batch that it has in the whole."""

from __future__ import annotations

import pytest

from qncd_cli.errors import ConfigError
from qncd_cli.lineage.shards import Shard, parse_shard, shard_folders
from qncd_cli.sampling.noise import chunks


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(("num", "batch_size"), [(1, 1), (6, 4), (64, 50), (100, 10), (101, 7)])
def test_shards_hold_the_batches_of_the_whole_each_once(num, batch_size, count):
    whole = range(5, 5 + num)
    shards = [Shard(index, count, whole).seeds(batch_size) for index in range(1, count + 1)]
    batches = [batch for seeds in shards for batch in chunks(seeds, batch_size)]
    assert batches == chunks(whole, batch_size)
    sizes = [-(-len(seeds) // batch_size) for seeds in shards]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "-1/2", "a/b", "1/0", "1/2/3", "1.0/2"])
def test_what_is_no_shard_is_one_line(text):
    with pytest.raises(ConfigError, match=r"--shard .*: not one of a number of shards"):
        parse_shard(text)


def test_folders_of_shards_come_by_their_numbers_and_others_are_left_out(tmp_path):
    of_set = tmp_path / "quantized"
    for name in ("10-of-12", "2-of-12", "1-of-12", "x-of-y", "2-of-12_sheet.png"):
        (tmp_path / "quantized.shards" / name).mkdir(parents=True)
    names = [path.name for path in shard_folders(of_set)]
    assert names == ["1-of-12", "2-of-12", "10-of-12"]
    assert Shard(*parse_shard("2/12"), range(9)).folder(of_set) in shard_folders(of_set)
