"""Preferences, intervals and agreement, beside published values and the binomial itself."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from qncd_cli.study.tally import Answer, fleiss_kappa, interval, tally
from qncd_cli.study.trials import make_trials


def key_of(variants=("full", "q"), count=40, labels=3):
    seeds = list(range(60))
    made = make_trials(
        list(variants), seeds, [str(s % labels) for s in seeds], count, random.Random(0)
    )
    return {"study": "s", "question": "Which?", "trials": [vars(trial) for trial in made]}


def rater(key, choose, seed=0):
    """Answers to all trials. choose: trial as the rater sees it -> side."""
    draw, answers = random.Random(seed), []
    for number, trial in enumerate(key["trials"]):
        flipped = draw.random() < 0.5
        shown = {**trial, "left": trial["right"], "right": trial["left"]} if flipped else trial
        answers.append(Answer(number, choose(shown), flipped))
    return answers


def prefers(name):
    """A chooser of one variant wherever it is, who is not caught, and else takes the left."""

    def choose(trial):
        wanted = "full" if trial["kind"] == "catch" else name
        return "right" if trial["right"] == wanted else "left"

    return choose


def tosses(seed):
    draw = random.Random(seed)

    def choose(trial):
        if trial["kind"] == "catch":
            return "left" if trial["left"] == "full" else "right"
        return draw.choice(["left", "right"])

    return choose


# ---- intervals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "count"), [(8, 20), (1, 1), (0, 20), (20, 20), (130, 200)])
def test_the_ends_of_an_interval_leave_two_and_a_half_percent_on_either_side(hits, count) -> None:
    """In fractions, without rounding: as Clopper and Pearson define the ends."""
    low, high = map(Fraction, interval(hits, count))

    def probability(of: range, p: Fraction) -> float:
        return float(sum(math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in of))

    assert (
        low == 0 if hits == 0 else probability(range(hits, count + 1), low) == pytest.approx(0.025)
    )
    assert (
        high == 1 if hits == count else probability(range(hits + 1), high) == pytest.approx(0.025)
    )


def test_intervals_of_many_answers() -> None:
    """Beside scipy.stats.binomtest(hits, count).proportion_ci(method="exact"), scipy 1.17.1."""
    assert interval(8, 20) == pytest.approx((0.1911900607, 0.6394574127), abs=1e-9)
    assert interval(1300, 2000) == pytest.approx((0.6286382699, 0.6709210564), abs=1e-9)


def test_an_interval_covers_the_truth_often_enough_for_every_share() -> None:
    for count, p in ((10, 0.5), (25, 0.9), (40, 0.03)):
        covered = sum(
            math.comb(count, k) * p**k * (1 - p) ** (count - k)
            for k in range(count + 1)
            if interval(k, count)[0] <= p <= interval(k, count)[1]
        )
        assert covered >= 0.95


# ---- agreement ----------------------------------------------------------------------------------


def test_kappa_of_the_published_example() -> None:
    """Fleiss' own table as Wikipedia has it: ten subjects, fourteen raters, five categories."""
    counts = [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)


def test_kappa_without_two_raters_or_two_categories_is_none() -> None:
    assert fleiss_kappa([]) is fleiss_kappa([[1, 0]]) is fleiss_kappa([[3, 0], [3, 0]]) is None


def test_raters_of_one_mind_agree_fully_and_coins_do_not() -> None:
    key = key_of(count=200)
    same = tally(key, {name: rater(key, prefers("full"), i) for i, name in enumerate("abc")})
    assert same["fleiss_kappa"] == pytest.approx(1.0) and same["kappa_trials"] == 200
    coins = tally(key, {name: rater(key, tosses(i), i) for i, name in enumerate("abc")})
    assert abs(coins["fleiss_kappa"]) < 0.15


# ---- raters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "hits"), [("full", 40), ("q", 0)])
def test_a_rater_who_always_finds_the_quantized_image_gives_the_exact_interval(name, hits) -> None:
    key = key_of()
    data = tally(key, {"hawk": rater(key, prefers(name))})
    (row,) = data["comparisons"]
    assert (row["first"], row["second"], row["hits"], row["count"]) == ("full", "q", hits, 40)
    edge = 0.025 ** (1 / 40)
    wanted = (edge, 1.0) if hits else (0.0, 1 - edge)
    assert (row["low"], row["high"]) == pytest.approx(wanted)
    assert not data["raters"][0]["left_out"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_rater_who_always_takes_one_side_is_named_and_not_counted(side) -> None:
    key = key_of()
    data = tally(key, {"lazy": rater(key, lambda trial: side), "fair": rater(key, tosses(0))})
    lazy, fair = data["raters"]
    assert lazy["always"] == side and lazy["left_out"] == f"always takes the {side} side"
    assert fair["always"] is None and not fair["left_out"]
    assert data["comparisons"][0]["count"] == 40


def test_few_answers_on_one_side_are_no_proof() -> None:
    key = key_of()
    answers = [
        a for a in rater(key, lambda trial: "left") if key["trials"][a.trial]["kind"] == "pair"
    ]
    assert tally(key, {"new": answers[:7]})["raters"][0]["always"] is None
    assert tally(key, {"new": answers[:8]})["raters"][0]["always"] == "left"


def test_a_rater_who_fails_the_catch_trials_is_named_and_not_counted() -> None:
    key = key_of()
    blind = rater(key, lambda trial: "left" if trial["left"] in ("damaged", "q") else "right")
    data = tally(key, {"blind": blind})
    assert data["raters"][0]["catch_failures"] == 4
    assert data["raters"][0]["left_out"] == "failed 4 of 4 catch trials"
    assert data["comparisons"] == [] and data["fleiss_kappa"] is None


def test_classes_and_null_trials_are_counted_apart() -> None:
    key = key_of()
    data = tally(key, {"a": rater(key, prefers("full"))})
    assert [row["label"] for row in data["classes"]] == ["0", "1", "2"]
    assert sum(row["count"] for row in data["classes"]) == 40
    assert data["null_left"]["hits"] == data["null_left"]["count"] == 4


def test_quantized_variants_are_compared_with_each_other() -> None:
    key = key_of(("full", "w4a6", "w4a8"), count=60)
    data = tally(key, {"a": rater(key, prefers("w4a8"))})
    found = {(row["first"], row["second"]): row for row in data["comparisons"]}
    assert found.keys() == {("full", "w4a6"), ("full", "w4a8"), ("w4a6", "w4a8")}
    assert found["w4a6", "w4a8"]["hits"] == found["full", "w4a8"]["hits"] == 0
    assert all(row["count"] == 20 for row in found.values())
