"""Classifier-free guidance as one batched call (Ho & Salimans, arXiv 2207.12598)."""

from __future__ import annotations

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

    condition, null_condition: keyword arguments of the denoiser with the batch first, like x.
    guidance_scale 1, or no null condition: the conditional prediction alone.
    """
    if guidance_scale == 1.0 or null_condition is None:
        return lambda x, t: predict(x, t, condition)
    both = {name: torch.cat([null_condition[name], condition[name]]) for name in condition}

    def predict_guided(x: Tensor, t: Tensor) -> Tensor:
        eps_null, eps_cond = predict(torch.cat([x, x]), t, both).chunk(2)
        return eps_null + guidance_scale * (eps_cond - eps_null)

    return predict_guided
