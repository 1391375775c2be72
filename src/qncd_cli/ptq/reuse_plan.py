"""Which site is kept at which step: least error under a budget of MACs, by dynamic programming.

A chain's sites lie within each other, the widest first. A step at level k keeps site k and computes
everything outside of it, so that the sites wider than k have new values; level K, of K sites,
computes all. The value of site k at step s is of the latest step before with a level above k.

For a price p of a MAC, the cost of a plan is the sum over its steps of

    w_s e(site, s, age) + p MACs

with w_s the weight of an error at step s and e(site, s, age) as ptq/reuse_errors.py measures it.
Between two steps at levels above k all levels are at most k, and the best ones there depend on
nothing outside: intervals within intervals, solved from the inner ones. The price is searched for
the least error within the budget. Chains lie apart: each is solved alone, at one price for all.
That errors of several steps and chains add up is an approximation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .reuse_errors import AGES, Errors

SEARCHES = 60
"""Halvings of the search for the price."""
PRICES = (1e-12, 1e6)
"""Ends of the search: weighed squared errors that all MACs of a step are worth."""
Levels = tuple[int, ...]


@dataclass(frozen=True)
class Chain:
    """sites: by name, the widest first; saved: share of all MACs that keeping each leaves out."""

    sites: tuple[str, ...]
    saved: tuple[float, ...]


def choose_plan(
    chains: Sequence[Chain], errors: Errors, weights: Sequence[float], budget: float
) -> tuple[tuple[frozenset[str], ...], float]:
    """The sites that are kept at every step, and the share of all MACs that is left.

    weights: of an error at each step; budget: that share, at most. Raises ConfigError for a budget
    that no plan keeps to.
    """

    def planned(price: float) -> tuple[list[Levels], float]:
        levels = [_best(chain, errors, weights, price) for chain in chains]
        return levels, _share(chains, levels)

    found = planned(PRICES[1])
    if found[1] > budget:
        raise ConfigError(
            f"sampling.reuse {budget:g}: the least share of MACs that reuse can reach here is "
            f"{found[1]:.2f}",
            "ask for a larger share",
        )
    low, high = (math.log(price) for price in PRICES)
    for _ in range(SEARCHES):
        middle = (low + high) / 2
        tried = planned(math.exp(middle))
        if tried[1] <= budget:
            high, found = middle, tried
        else:
            low = middle
    kept = [
        frozenset(
            chain.sites[levels[step]]
            for chain, levels in zip(chains, found[0], strict=True)
            if levels[step] < len(chain.sites)
        )
        for step in range(len(weights))
    ]
    return tuple(kept), found[1]


def _share(chains: Sequence[Chain], plans: Sequence[Levels]) -> float:
    """Share of all MACs that plans leave, one for each chain."""
    saved = sum(
        chain.saved[level]
        for chain, levels in zip(chains, plans, strict=True)
        for level in levels
        if level < len(chain.sites)
    )
    return 1 - saved / len(plans[0])


def _best(chain: Chain, errors: Errors, weights: Sequence[float], price: float) -> Levels:
    """The levels of all steps with the least cost."""
    steps, top = len(weights), len(chain.sites)
    of_site: list[Mapping[tuple[int, int], float]] = [errors[name] for name in chain.sites]

    def cost(level: int, step: int, source: int) -> float:
        error = of_site[level].get((step, step - source), math.inf)
        return weights[step] * error - price * chain.saved[level]

    @functools.cache
    def between(level: int, start: int, end: int) -> tuple[float, Levels]:
        """The steps after start and before end, at levels up to this one."""
        if start + 1 == end:
            return 0.0, ()
        if level < 0 or end - start - 1 > AGES:
            return math.inf, ()
        best: dict[int, tuple[float, Levels]] = {start: (0.0, ())}
        for step in range(start + 1, end + 1):
            ways = [(*_joined(before, between(level - 1, p, step)),) for p, before in best.items()]
            total, levels = min(ways)
            if step == end:
                return total, levels
            best[step] = total + cost(level, step, start), (*levels, level)
        raise AssertionError("the last step returns")

    whole: list[tuple[float, Levels]] = [(0.0, (top,))]
    for step in range(1, steps + 1):
        nearest = range(max(0, step - AGES - 1), step)
        total, levels = min(_joined(whole[p], between(top - 1, p, step)) for p in nearest)
        whole.append((total, (*levels, top)))
    return whole[steps][1][:steps]


def _joined(first: tuple[float, Levels], then: tuple[float, Levels]) -> tuple[float, Levels]:
    return first[0] + then[0], first[1] + then[1]
