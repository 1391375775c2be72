"""Pairs of images of the same seeds: how sure their numbers are, and what each class is like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import bootstrap
from .similarity import ssim_each
from .tensor import (
    CHANGED_DB,
    LOW_QUANTILE,
    each_psnr_db,
    each_sqnr_db,
    energies,
    paired_fidelity,
    pooled_psnr_db,
    pooled_sqnr_db,
    squared_errors,
)

Interval = dict[str, float | None]
Scores = Mapping[str, Sequence[float] | None]
LOWER = {"lpips"}
"""Scores of pairs that are lower for better ones."""
WORST = 5
"""Seeds that are named: those of the lowest PSNR."""
SCORES = (
    *("feature_distance", "spatial_distance", "feature_distance_infinity"),
    *("kernel_distance", "class_score", "precision", "recall", "clip_score"),
)
"""Numbers of a set whose change from full precision is told."""


@dataclass(frozen=True)
class Pairs:
    """How far the samples of two sets are apart, pair by pair, float64.

    errors: [N] of pixels (`squared_errors`); energies: [N, 2] of latents (`energies`); ssim: [N],
    [0] where it is not defined.
    """

    errors: Tensor
    energies: Tensor
    ssim: Tensor

    @classmethod
    def of(cls, images: tuple[Tensor, Tensor], latents: tuple[Tensor, Tensor]) -> Pairs:
        """Pairs of full precision and quantized, as the metrics in question take them."""
        ssim = torch.tensor(ssim_each(*images) or (), dtype=torch.float64)
        return cls(squared_errors(*images), energies(*latents), ssim)

    @classmethod
    def joined(cls, parts: Sequence[Pairs]) -> Pairs:
        """All pairs of parts, one part after the other."""
        names = ("errors", "energies", "ssim")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def of_pairs(
    seeds: Sequence[int],
    classes: Sequence[int],
    pairs: Pairs,
    seen: Mapping[str, Sequence[int]],
    seed: int,
    scores: Scores,
) -> dict[str, Any]:
    """What `fidelity` of metrics.json says of pairs: pooled, by seed, spread, intervals, by class.

    pairs: full precision and quantized, in the order of the seeds; seen: see by_class; scores: more
    of each pair, by name, higher for better ones but for LOWER, None where there is none.
    """
    found = paired_fidelity(seeds, each_psnr_db(pairs.errors), each_sqnr_db(pairs.energies))
    psnr, sqnr = (list(found["per_seed"][key].values()) for key in ("psnr_db", "sqnr_db"))
    scores = {"ssim": pairs.ssim.tolist() if len(pairs.ssim) else None, **scores}
    for name, values in scores.items():
        if values is not None:
            found["per_seed"][name] = dict(zip(map(str, seeds), values, strict=True))
    worst = sorted(found["per_seed"]["psnr_db"].items(), key=lambda pair: pair[1])
    signals = pairs.energies[:, 0].tolist()
    drawn = bootstrap.weights(len(seeds), seed=seed)
    return {
        "psnr_db": pooled_psnr_db(pairs.errors),
        "sqnr_latents_db": pooled_sqnr_db(pairs.energies),
        **found,
        **_spread(scores),
        "worst_seeds": [int(name) for name, _ in worst[:WORST]],
        "intervals": intervals(psnr, sqnr, signals, scores, drawn),
        "by_class": by_class(classes, psnr, sqnr, scores.get("ssim"), seen),
    }


def _worst(name: str) -> tuple[str, Callable[[np.ndarray], float]]:
    """How a score's quantile of the worst 5 % is called, and how it is taken."""
    if name in LOWER:
        return f"{name}_q95", lambda values: float(np.quantile(values, 1 - LOW_QUANTILE))
    return f"{name}_q05", _low


def _low(values: np.ndarray) -> float:
    return float(np.quantile(values, LOW_QUANTILE))


def _changed(values: np.ndarray) -> float:
    return float((values < CHANGED_DB).sum())


def _decibels(ratio: float) -> float:
    return 10 * np.log10(ratio)


def _spread(scores: Scores) -> dict[str, float | None]:
    """Mean, median and the quantile of the worst of each score; all None where there is none."""
    found: dict[str, float | None] = {}
    for name, values in scores.items():
        ending, worst = _worst(name)
        keys = (name, f"{name}_median", ending)
        rows = None if values is None else np.array(values)
        numbers = (None,) * 3 if rows is None else (rows.mean(), np.median(rows), worst(rows))
        found |= {k: None if n is None else float(n) for k, n in zip(keys, numbers, strict=True)}
    return found


def intervals(
    psnr: Sequence[float],
    sqnr: Sequence[float],
    signals: Sequence[float],
    scores: Scores,
    drawn: Tensor,
) -> dict[str, Interval]:
    """95 % intervals of the numbers in `fidelity`, by their keys.

    psnr, sqnr: of each pair, dB between -IDENTICAL_DB and IDENTICAL_DB; signals: squared length of
    each latent of full precision; scores: see of_pairs; drawn: weights of a bootstrap [R, N].
    Statistics of equal pairs alone do not vary.
    """
    errors = 10 ** (-np.array(psnr) / 10)
    energy = np.stack([signals, np.array(signals) / 10 ** (np.array(sqnr) / 10)], axis=1)

    def pooled(rows: np.ndarray) -> float:
        return _decibels(rows[:, 0].sum() / rows[:, 1].sum())

    def mean(rows: np.ndarray) -> float:
        return float(rows.mean())

    wanted: dict[str, tuple[Callable[[np.ndarray], float], Any]] = {
        "psnr_db": (lambda rows: -_decibels(rows.mean()), errors),
        "sqnr_latents_db": (pooled, energy),
        "changed": (_changed, psnr),
    }
    for name, values in (("psnr", psnr), ("sqnr", sqnr)):
        wanted[f"{name}_median_db"] = (lambda rows: float(np.median(rows)), values)
        wanted[f"{name}_q05_db"] = (_low, values)
    for name, each in scores.items():
        if each is not None:
            ending, worst = _worst(name)
            wanted |= {
                name: (mean, each),
                f"{name}_median": (lambda rows: float(np.median(rows)), each),
                ending: (worst, each),
            }
    found, told = {}, {"psnr_db": psnr, "sqnr_latents_db": sqnr}
    for key, (statistic, values) in wanted.items():
        value, own = statistic(np.asarray(values)), told.get(key, values)
        # no mean, median or quantile is beyond the values that it is of
        bounds = (min(*own, value), max(*own, value))
        if key == "changed":
            bounds = 0.0, float(len(psnr))
        replicates = bootstrap.of_statistic(statistic, values, drawn)
        low, high = bootstrap.interval(value, replicates, bounds)
        found[key] = {"low": low, "high": high}
    return found


def changes(
    full: Mapping[str, Any],
    quantized: Mapping[str, Any],
    replicates: Mapping[str, np.ndarray],
    other_replicates: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """What quantization adds to each number of a set: key -> {value, low, high}.

    full, quantized: objects of metrics.json; the replicates are of the same draws of the same
    seeds, so what both sets share moves neither end of an interval.
    """
    found = {}
    for key in SCORES:
        one, other = (_value(entry.get(key)) for entry in (full, quantized))
        if one is None or other is None or not {key} <= replicates.keys() & other_replicates.keys():
            continue
        low, high = bootstrap.interval(other - one, other_replicates[key] - replicates[key])
        found[key] = {"value": other - one, "low": low, "high": high}
    return found


def _value(entry: Any) -> float | None:
    return entry.get("value") if isinstance(entry, Mapping) else entry


def by_class(
    classes: Sequence[int],
    psnr: Sequence[float],
    sqnr: Sequence[float],
    ssim: Sequence[float] | None,
    seen: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """Medians of the pairs of each class, or prompt: class -> its numbers.

    seen: set -> the class that a classifier sees in each image; empty where none knows them.
    """
    labels = np.array(classes)
    found = {}
    for label in sorted(set(classes)):
        own = labels == label
        numbers: dict[str, Any] = {
            "num_samples": int(own.sum()),
            "psnr_median_db": float(np.median(np.array(psnr)[own])),
            "sqnr_median_db": float(np.median(np.array(sqnr)[own])),
            "ssim_median": None if ssim is None else float(np.median(np.array(ssim)[own])),
            "changed": int(_changed(np.array(psnr)[own])),
        }
        for name, labels_seen in seen.items():
            numbers[f"class_agreement_{name}"] = float((np.array(labels_seen)[own] == label).mean())
        found[str(label)] = numbers
    return found
