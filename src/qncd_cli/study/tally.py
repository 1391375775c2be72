"""What raters answered: preferences with intervals, agreement, and who cannot be counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .trials import CATCH, FULL, NULL, PAIR

LEVEL = 0.95
INTERVAL = "Clopper-Pearson, 95 %"
"""Exact: it covers the truth at least that often, for few answers too; Wilson's is narrower and
covers it on average."""
SIDED = 8
"""Answers from which on one side alone is no chance: 1 in 128 for somebody who tosses a coin."""
FAILED_SHARE = 0.25
"""Share of failed catch trials above which a rater is not counted."""
LEFT, RIGHT = "left", "right"


@dataclass(frozen=True)
class Answer:
    """One answer. trial: number of the trial; side: as the rater saw it; flipped: whether the
    rater saw the trial's sides exchanged."""

    trial: int
    side: str
    flipped: bool

    @property
    def key_side(self) -> str:
        """The side by the key."""
        return self.side if not self.flipped else RIGHT if self.side == LEFT else LEFT


def tally(key: Mapping[str, Any], results: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """The content of study.json. key: of study_key.json; results: rater -> answers.

    Raters who take one side alone, or fail more than FAILED_SHARE of the catch trials, are named
    and not counted. Preferences pool the answers of the others, as if they were independent;
    raters' own shares stand beside them.
    """
    trials = key["trials"]
    raters = [_rater(name, answers, trials) for name, answers in results.items()]
    counted = {r["rater"]: results[r["rater"]] for r in raters if not r["left_out"]}
    chosen = [
        (trials[answer.trial], trials[answer.trial][answer.key_side])
        for answers in counted.values()
        for answer in answers
    ]
    pairs = [(trial, variant) for trial, variant in chosen if trial["kind"] == PAIR]
    nulls = [
        answer.side == LEFT
        for answers in counted.values()
        for answer in answers
        if trials[answer.trial]["kind"] == NULL
    ]
    kappa, rated = _agreement(trials, counted)
    return {
        "study": key["study"],
        "question": key["question"],
        "interval": INTERVAL,
        "raters": raters,
        "comparisons": _preferences(pairs, lambda trial: ""),
        "classes": _preferences(pairs, lambda trial: trial["label"]),
        "null_left": share(sum(nulls), len(nulls)),
        "fleiss_kappa": kappa,
        "kappa_trials": rated,
    }


def _rater(
    name: str, answers: Sequence[Answer], trials: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    left = sum(answer.side == LEFT for answer in answers)
    caught = [a for a in answers if trials[a.trial]["kind"] == CATCH]
    failed = sum(trials[a.trial][a.key_side] != FULL for a in caught)
    against = [
        a for a in answers if FULL in _both(trials[a.trial]) and trials[a.trial]["kind"] == PAIR
    ]
    full = sum(trials[a.trial][a.key_side] == FULL for a in against)
    always = None
    if len(answers) >= SIDED and left in (0, len(answers)):
        always = LEFT if left else RIGHT
    why = ""
    if always:
        why = f"always takes the {always} side"
    elif caught and failed > FAILED_SHARE * len(caught):
        why = f"failed {failed} of {len(caught)} catch trials"
    return {
        "rater": name,
        "answers": len(answers),
        "left": left,
        "always": always,
        "catches": len(caught),
        "catch_failures": failed,
        "full_preferred": share(full, len(against)),
        "left_out": why,
    }


def _both(trial: Mapping[str, Any]) -> tuple[str, str]:
    return trial[LEFT], trial[RIGHT]


def _preferences(
    pairs: Iterable[tuple[Mapping[str, Any], str]], group: Callable[[Mapping[str, Any]], str]
) -> list[dict[str, Any]]:
    """How often either variant of each comparison was preferred. group: of a trial."""
    found: dict[tuple[str, str, str], list[bool]] = {}
    for trial, variant in pairs:
        one, other = sorted(_both(trial), key=lambda name: (name != FULL, name))
        found.setdefault((group(trial), one, other), []).append(variant == one)
    return [
        {"label": label, "first": one, "second": other, **share(sum(hits), len(hits))}
        for (label, one, other), hits in sorted(found.items(), key=lambda item: _order(item[0]))
    ]


def _order(names: tuple[str, str, str]) -> tuple[Any, ...]:
    """Classes by their numbers, full precision first."""
    label, one, other = names
    number = int(label) if label.isdigit() else math.inf
    return number, label, one != FULL, one, other


# ------------------------------------------------------------------ statistics


def share(hits: int, count: int) -> dict[str, Any]:
    """{hits, count, value, low, high}: a share with its exact interval, None of no answers."""
    if count == 0:
        return {"hits": 0, "count": 0, "value": None, "low": None, "high": None}
    low, high = interval(hits, count)
    return {"hits": hits, "count": count, "value": hits / count, "low": low, "high": high}


def interval(hits: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """The exact binomial interval of `hits` out of `count`.

    Its ends are the shares for which so many hits or more, so many or fewer, have a probability of
    (1 - level) / 2. Source: Clopper and Pearson 1934 (Biometrika 26, 404-413).
    """
    tail = (1 - level) / 2
    low = _solve(lambda p: _at_least(hits, count, p) - tail) if hits > 0 else 0.0
    high = _solve(lambda p: tail - _at_least(count - hits, count, 1 - p)) if hits < count else 1.0
    return low, high


def _at_least(hits: int, count: int, p: float) -> float:
    """Probability of `hits` or more out of `count` with chance p in (0, 1) each."""
    logs = math.log(p), math.log1p(-p)
    whole = math.lgamma(count + 1)
    return math.fsum(
        math.exp(
            whole
            - math.lgamma(k + 1)
            - math.lgamma(count - k + 1)
            + k * logs[0]
            + (count - k) * logs[1]
        )
        for k in range(hits, count + 1)
    )


def _solve(rising: Callable[[float], float]) -> float:
    """Where a function that rises over (0, 1) is 0, by halving."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def _agreement(
    trials: Sequence[Mapping[str, Any]], counted: Mapping[str, Sequence[Answer]]
) -> tuple[float | None, int]:
    """Fleiss' kappa over the trials that all counted raters have answered, and their number."""
    sides: dict[int, list[str]] = {}
    for answers in counted.values():
        for answer in answers:
            if trials[answer.trial]["kind"] == PAIR:
                sides.setdefault(answer.trial, []).append(answer.key_side)
    whole = [found for found in sides.values() if len(found) == len(counted)]
    return fleiss_kappa([[f.count(LEFT), f.count(RIGHT)] for f in whole]), len(whole)


def fleiss_kappa(counts: Sequence[Sequence[int]]) -> float | None:
    """Agreement beyond chance, 1 for full agreement, 0 for chance, of one row of counts per item.

    counts: raters by category; the same number n >= 2 of raters in each row. None where there are
    none, or where all answers fall into one category. Categories of a study are the sides by its
    key, which were drawn at random: agreement on an image is agreement on its side.
    Source: Fleiss 1971 (Psychological Bulletin 76, 378-382).
    """
    if not counts or sum(counts[0]) < 2:
        return None
    raters, items = sum(counts[0]), len(counts)
    shares = [sum(column) / (raters * items) for column in zip(*counts, strict=True)]
    chance = sum(p * p for p in shares)
    if chance == 1:
        return None
    agreed = sum((sum(n * n for n in row) - raters) / (raters * (raters - 1)) for row in counts)
    return (agreed / items - chance) / (1 - chance)
