"""Trials of a two-alternative forced-choice study, in random order and on random sides.

Three kinds: `pair` compares two variants on one seed and counts; `null` shows one quantized image
twice, so that nothing but a leaning to one side decides it; `catch` sets an image beside a badly
damaged copy, which whoever looks at all finds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

PAIR, NULL, CATCH = "pair", "null", "catch"
FULL, DAMAGED = "full", "damaged"
"""Names of what is no quantized variant."""
CONTROL_SHARE = 0.1
"""Trials of either control, as a share of those that count; more tire raters."""
LEAST_CONTROLS = 2


@dataclass(frozen=True)
class Trial:
    """left, right: variants on either side; label: the class or prompt of the seed."""

    kind: str
    seed: int
    label: str
    left: str
    right: str


def make_trials(
    variants: Sequence[str],
    seeds: Sequence[int],
    labels: Sequence[str],
    count: int,
    draw: random.Random,
) -> list[Trial]:
    """Trials in random order: as many that count as asked, and both controls among them.

    variants: full precision first, then quantized ones. Every two of them are compared equally
    often, within one; of each comparison either variant is on the left half of the time, within
    one. Seeds are used in random order, each again only when all were.
    """
    compared = list(combinations(variants, 2))
    controls = max(LEAST_CONTROLS, round(CONTROL_SHARE * count))
    rows = _rows(len(seeds), count + 2 * controls, draw)
    trials: list[tuple[str, str, str]] = []
    flips = {pair: _sides(count // len(compared) + 1, draw) for pair in compared}
    for number in range(count):
        pair = compared[number % len(compared)]
        trials.append(_trial(PAIR, *pair, flips[pair].pop()))
    quantized = variants[1:]
    for number in range(controls):
        same = quantized[number % len(quantized)]
        trials.append((NULL, same, same))
    trials += [_trial(CATCH, FULL, DAMAGED, flip) for flip in _sides(controls, draw)]
    draw.shuffle(trials)
    return [
        Trial(kind, seeds[row], labels[row], left, right)
        for (kind, left, right), row in zip(trials, rows, strict=True)
    ]


def _trial(kind: str, one: str, other: str, flip: bool) -> tuple[str, str, str]:
    return (kind, other, one) if flip else (kind, one, other)


def _sides(count: int, draw: random.Random) -> list[bool]:
    """Sides in random order, as many of either, within one."""
    odd = [draw.random() < 0.5] * (count % 2)
    sides = [True, False] * (count // 2) + odd
    draw.shuffle(sides)
    return sides


def _rows(count: int, wanted: int, draw: random.Random) -> list[int]:
    rows: list[int] = []
    while len(rows) < wanted:
        again = list(range(count))
        draw.shuffle(again)
        rows += again
    return rows[:wanted]
