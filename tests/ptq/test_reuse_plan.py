"""The plan of reuse: least weighed error under a budget, by dynamic programming."""

from __future__ import annotations

import itertools

import pytest
import torch

from qncd_cli.errors import ConfigError
from qncd_cli.ptq.reuse_errors import AGES
from qncd_cli.ptq.reuse_plan import Chain, choose_plan

NESTED = Chain(("wide", "narrow"), (0.8, 0.3))


def drawn(chains, steps, seed=0):
    """Errors that grow with age, and weights."""
    generator = torch.Generator().manual_seed(seed)

    def one(age):
        return age * float(torch.rand((), generator=generator) + 0.1)

    errors = {
        name: {(s, a): one(a) for s in range(steps) for a in range(1, min(s, AGES) + 1)}
        for chain in chains
        for name in chain.sites
    }
    return errors, [float(torch.rand((), generator=generator)) + 0.1 for _ in range(steps)]


def judged(levels, chain, errors, weights):
    """Error and share of MACs of a chain's levels, from their definition."""
    total, saved = 0.0, 0.0
    for step, level in enumerate(levels):
        if level == len(chain.sites):
            continue
        source = max((s for s in range(step) if levels[s] > level), default=None)
        if source is None or step - source > AGES:
            return None
        total += weights[step] * errors[chain.sites[level]][step, step - source]
        saved += chain.saved[level]
    return total, 1 - saved / len(levels)


def levels_of(kept, chain):
    own = [[chain.sites.index(n) for n in names if n in chain.sites] for names in kept]
    return [found[0] if found else len(chain.sites) for found in own]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_no_plan_of_as_few_macs_has_less_error(seed, budget):
    errors, weights = drawn([NESTED], 6, seed)
    kept, share = choose_plan([NESTED], errors, weights, budget)
    found = judged(levels_of(kept, NESTED), NESTED, errors, weights)
    assert found is not None and found[1] == pytest.approx(share) and share <= budget
    for levels in itertools.product(range(3), repeat=6):
        other = judged(levels, NESTED, errors, weights)
        if other is not None and other[1] <= share + 1e-12:
            assert other[0] >= found[0] - 1e-12, levels


def test_chains_that_lie_apart_share_the_budget():
    chains = [Chain(("a",), (0.5,)), Chain(("b",), (0.5,))]
    errors, weights = drawn(chains, 5)
    errors["b"] = {key: 100 * value for key, value in errors["b"].items()}
    kept, share = choose_plan(chains, errors, weights, 0.7)
    assert share <= 0.7
    assert sum("a" in names for names in kept) > sum("b" in names for names in kept)
    assert kept[0] == frozenset()


def test_a_step_that_counts_for_nothing_is_where_work_is_left_out():
    errors, weights = drawn([NESTED], 8)
    weights[5] = 0.0
    kept, _ = choose_plan([NESTED], errors, weights, 0.9)
    assert kept[5] == {"wide"}


def test_a_budget_that_no_plan_keeps_to_is_refused_with_the_least_there_is():
    errors, weights = drawn([NESTED], 6)
    with pytest.raises(ConfigError, match=r"sampling.reuse 0.1: the least .* here is 0\.33"):
        choose_plan([NESTED], errors, weights, 0.1)


def test_nothing_is_kept_longer_than_was_measured():
    errors, weights = drawn([NESTED], 30)
    kept, _ = choose_plan([NESTED], errors, weights, 0.36)
    assert judged(levels_of(kept, NESTED), NESTED, errors, weights) is not None
