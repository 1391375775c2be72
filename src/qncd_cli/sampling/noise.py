"""Named randomness: every draw belongs to one sample's seed and to one named stream.

A sample is a function of model, configuration and its own seed. Each sample therefore owns one
CPU generator per stream; nothing is ever drawn for a whole batch at once, so batch size, number
of processes, device and resumption change none of the numbers.

Streams: "sample" is the seed itself, as a diffusers user would give it
(`torch.Generator().manual_seed(seed)`): initial noise first, then the scheduler's own draws.
Any other name ("correction", ...) is an independent stream derived from name and seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError

SAMPLE_STREAM = "sample"
_DERIVED_SEED_BYTES = 8  # manual_seed takes 64 bits


def generator_for(seed: int, stream: str = SAMPLE_STREAM) -> torch.Generator:
    """CPU generator of one sample's `stream`.

    "sample" is `manual_seed(seed)`; any other stream is seeded with the first 8 bytes of
    sha256(f"{stream}:{seed}"), so that streams of one seed, and of neighbouring seeds, are
    unrelated. Raises ConfigError if seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed {seed} is negative", "seeds are integers from 0 on")
    if stream != SAMPLE_STREAM:
        digest = hashlib.sha256(f"{stream}:{seed}".encode()).digest()
        seed = int.from_bytes(digest[:_DERIVED_SEED_BYTES], "big", signed=True)
    return torch.Generator(device="cpu").manual_seed(seed)


def generators_for(seeds: Sequence[int], stream: str = SAMPLE_STREAM) -> list[torch.Generator]:
    """One generator per sample, in the order of `seeds`."""
    return [generator_for(seed, stream) for seed in seeds]


def initial_noise(
    generators: Sequence[torch.Generator],
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise [N, *shape] on the CPU, drawn sample by sample.

    generators: N, one per sample, advanced by this call; shape: of one sample, without N.
    Equals `diffusers.utils.torch_utils.randn_tensor` with the same list of generators.
    """
    draws = [torch.randn((1, *shape), generator=g, dtype=dtype) for g in generators]
    return torch.cat(draws)


def parse_seeds(text: str) -> list[int]:
    """Seeds from "7", "0-99" (both ends included) or "0-9,20,30-39", sorted, each once.

    Raises ConfigError for anything else.
    """
    seeds: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or int(last) < int(first):
            raise ConfigError(
                f"cannot read seeds {text!r}: {part.strip()!r} is neither a number nor a range",
                "write for instance 0-99 or 0-9,20,30-39",
            )
        seeds.update(range(int(first), int(last) + 1))
    return sorted(seeds)


def ranges(seeds: Sequence[int]) -> str:
    """Seeds in ascending order as parse_seeds reads them: "0-9,20,30-39"."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and runs[-1][1] == seed - 1:
            runs[-1][1] = seed
        else:
            runs.append([seed, seed])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


def chunks(seeds: Sequence[int], batch_size: int) -> list[list[int]]:
    """Cut the *complete* list of seeds into batches of up to `batch_size`, each without a gap.

    Cut first and drop finished seeds afterwards: the batches are then the same in every run,
    resumed or not. Gaps end a batch, so that its first seed and its length say which seeds it
    holds. Raises ConfigError if batch_size < 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size} is not positive", "use 1 or more")
    batches: list[list[int]] = []
    for seed in seeds:
        if batches and len(batches[-1]) < batch_size and batches[-1][-1] == seed - 1:
            batches[-1].append(seed)
        else:
            batches.append([seed])
    return batches
