"""Draws belong to seeds: batch composition changes no bit."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from qncd_cli.errors import ConfigError
from qncd_cli.sampling.noise import (
    chunks,
    generator_for,
    generators_for,
    initial_noise,
    parse_seeds,
    ranges,
)

SHAPE = (3, 8, 8)


def test_sample_stream_is_what_a_diffusers_user_gets():
    seeds = [0, 7, 123456]
    theirs = randn_tensor((3, *SHAPE), generator=[torch.Generator().manual_seed(s) for s in seeds])
    assert torch.equal(initial_noise(generators_for(seeds), SHAPE), theirs)


@pytest.mark.parametrize("stream", ["sample", "correction"])
def test_noise_is_the_same_alone_and_in_a_batch(stream):
    batch = initial_noise(generators_for(range(5), stream), SHAPE)
    for seed in range(5):
        alone = initial_noise([generator_for(seed, stream)], SHAPE)
        assert torch.equal(batch[seed : seed + 1], alone)


def test_generators_continue_per_sample():
    generators = generators_for([3, 4])
    first, second = initial_noise(generators, SHAPE), initial_noise(generators, SHAPE)
    alone = generator_for(4)
    assert torch.equal(initial_noise([alone], SHAPE)[0], first[1])
    assert torch.equal(initial_noise([alone], SHAPE)[0], second[1])


def test_streams_and_seeds_differ_and_are_stable():
    draws = {
        (stream, seed): initial_noise([generator_for(seed, stream)], (4,)).sum().item()
        for stream in ("sample", "correction", "classes")
        for seed in (0, 1)
    }
    assert len(set(draws.values())) == len(draws)
    # sha256("correction:0"), first 8 bytes: printf 'correction:0' | sha256sum
    assert generator_for(0, "correction").initial_seed() % 2**64 == CORRECTION_SEED_0


CORRECTION_SEED_0 = 0xF25EC53D912C4094


def test_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="seed -1"):
        generator_for(-1)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("7", [7]), ("0-3", [0, 1, 2, 3]), ("5, 1-2,2", [1, 2, 5])],
)
def test_parse_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "1,,2", "1.5"])
def test_parse_seeds_refuses(text):
    with pytest.raises(ConfigError, match="cannot read seeds"):
        parse_seeds(text)


def test_chunks_cover_the_list_in_order():
    assert chunks(range(5), 2) == [[0, 1], [2, 3], [4]]
    assert chunks([], 2) == []
    with pytest.raises(ConfigError, match="batch size 0"):
        chunks([1], 0)


def test_a_gap_ends_a_batch():
    """Its first seed and its length then say which seeds it holds."""
    seeds = [0, 1, 2, 7, 10**6, 10**6 + 1, 10**12]
    assert chunks(seeds, 2) == [[0, 1], [2], [7], [10**6, 10**6 + 1], [10**12]]
    assert chunks(seeds, 50) == [[0, 1, 2], [7], [10**6, 10**6 + 1], [10**12]]


@pytest.mark.parametrize("text", ["7", "0-3", "0-3,7,1000000-1000003"])
def test_ranges_are_what_seeds_are_read_from(text):
    assert ranges(parse_seeds(text)) == text


def test_no_seeds_have_no_ranges():
    assert ranges([]) == ""
