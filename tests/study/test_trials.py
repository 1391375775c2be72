"""Trials are in random order, on random sides, and as many of either as was promised."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest

from qncd_cli.study.trials import CATCH, DAMAGED, FULL, NULL, PAIR, make_trials

SEEDS = list(range(100, 107))
LABELS = [str(seed % 3) for seed in SEEDS]


def trials(variants, count=40, seed=0):
    return make_trials(variants, SEEDS, LABELS, count, random.Random(seed))


@pytest.mark.parametrize("variants", [["full", "a"], ["full", "a", "b"], ["full", "a", "b", "c"]])
@pytest.mark.parametrize("count", [1, 7, 40, 61])
def test_every_comparison_comes_equally_often_and_on_either_side(variants, count) -> None:
    made = trials(variants, count)
    pairs = Counter(frozenset((t.left, t.right)) for t in made if t.kind == PAIR)
    assert sum(pairs.values()) == count
    wanted = [frozenset(pair) for pair in combinations(variants, 2)]
    assert max(pairs[p] for p in wanted) - min(pairs[p] for p in wanted) <= 1
    for one, _ in combinations(variants, 2):
        sides = Counter(t.left == one for t in made if t.kind == PAIR and one in (t.left, t.right))
        assert abs(sides[True] - sides[False]) <= 2 * len(variants)


def test_controls_are_a_tenth_of_either_kind_and_at_least_two() -> None:
    for count, controls in ((5, 2), (40, 4), (100, 10)):
        kinds = Counter(trial.kind for trial in trials(["full", "a"], count))
        assert kinds == {PAIR: count, NULL: controls, CATCH: controls}
    for trial in trials(["full", "a"]):
        assert {"pair": {FULL, "a"}, "null": {"a"}, "catch": {FULL, DAMAGED}}[trial.kind] == {
            trial.left,
            trial.right,
        }


def test_seeds_are_used_equally_often_with_their_labels() -> None:
    made = trials(["full", "a"], 40)
    used = Counter(trial.seed for trial in made)
    assert used.keys() == set(SEEDS) and max(used.values()) - min(used.values()) <= 1
    assert all(trial.label == LABELS[SEEDS.index(trial.seed)] for trial in made)


def test_order_and_sides_follow_the_draw_alone() -> None:
    assert trials(["full", "a"], seed=1) == trials(["full", "a"], seed=1)
    assert trials(["full", "a"], seed=1) != trials(["full", "a"], seed=2)
    firsts = {trials(["full", "a"], seed=seed)[0].left for seed in range(20)}
    assert firsts >= {"full", "a"}, "no side is first for good"
