"""Gains of one row over another on the same seeds, with intervals that pair them.

A seed that is hard for one row is hard for the others: of the difference between two rows, sample
by sample, most of that cancels, and its interval is narrower than either row's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

ROUNDS = 1000
"""Resamplings of the seeds; fewer make the interval's ends jump from one seed to the next."""
CONFIDENCE = (0.025, 0.975)
GAIN = "sqnr_gain_db"
"""Name of the gain in a row of ablation.json."""


def with_gains(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its gain over the first row of the same widths (which has none)."""
    first: dict[tuple[int, int], Mapping[str, Any]] = {}
    found = []
    for row in rows:
        base = first.setdefault((row["weights"], row["activations"]), row)
        gain = None
        if base is not row:
            gain = median_gain(_per_seed(base), _per_seed(row))
        found.append({**row, GAIN: gain})
    return found


def median_gain(base: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float] | None:
    """The median over the seeds of other - base, dB, as {value, low, high}.

    base, other: dB by seed. Only seeds that both have count; None where they share none. The
    interval holds the median of 95 % of the sets of as many seeds, drawn from these with
    replacement. Deterministic.
    """
    shared = [seed for seed in base if seed in other]
    if not shared:
        return None
    differences = torch.tensor([other[s] - base[s] for s in shared], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(shared), (ROUNDS, len(shared)), generator=generator)
    medians = differences[drawn].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor(CONFIDENCE, dtype=torch.float64)).tolist()
    return {"value": float(differences.quantile(0.5)), "low": low, "high": high}


def _per_seed(row: Mapping[str, Any]) -> Mapping[str, float]:
    found: Mapping[str, float] = row["per_seed"]["sqnr_db"]
    return found
