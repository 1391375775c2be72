"""Classifier-free guidance as one batched call (Ho & Salimans, arXiv 2207.12598)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

RawPredict = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


def guided(
    predict: RawPredict,
    condition: Mapping[str, Tensor],
    null_condition: Mapping[str, Tensor] | None,
    guidance_scale: float,
) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, t) -> eps_null + guidance_scale * (eps_cond - eps_null), both halves in one call.

    condition, null_condition: keyword arguments of the denoiser with the batch first, like x,
    which may hold fewer rows: the first ones of the batch.
    No null condition, where guidance is off: the conditional prediction alone.
    """
    if null_condition is None:
        return lambda x, t: predict(x, t, _first(condition, len(x)))

    @functools.cache
    def both(rows: int) -> Mapping[str, Tensor]:
        null, own = _first(null_condition, rows), _first(condition, rows)
        return {name: torch.cat([null[name], own[name]]) for name in own}

    def predict_guided(x: Tensor, t: Tensor) -> Tensor:
        eps_null, eps_cond = predict(torch.cat([x, x]), t, both(len(x))).chunk(2)
        return eps_null + guidance_scale * (eps_cond - eps_null)

    return predict_guided


def _first(condition: Mapping[str, Tensor], rows: int) -> Mapping[str, Tensor]:
    return {name: value[:rows] for name, value in condition.items()}
