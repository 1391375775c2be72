"""The three things that a denoiser may predict about x_t, and eps, in which corrections work.

In variance-preserving scale, with x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps:
    epsilon         eps, the noise itself (DDPM, 2006.11239)
    sample          x_0, the clean latent
    v_prediction    v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho, 2202.00512)
At a given x_t each is an affine function of each other one.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

PARAMETRIZATIONS = ("epsilon", "sample", "v_prediction")


def prediction_type(scheduler: Any) -> str:
    """What the scheduler takes the model to predict, in diffusers' words."""
    return str(scheduler.config.get("prediction_type", "epsilon"))


def to_eps(prediction: Tensor, x: Tensor, abar: float, kind: str) -> Tensor:
    """The noise in x that a prediction about x implies; `prediction` itself where it is eps.

    prediction, x: [N, C, ...], x in VP scale at level 0 < abar < 1; kind: of PARAMETRIZATIONS.
    """
    if kind == "epsilon":
        return prediction
    if kind == "v_prediction":
        return math.sqrt(abar) * prediction + math.sqrt(1 - abar) * x
    return (x - math.sqrt(abar) * prediction) / math.sqrt(1 - abar)


def with_eps(prediction: Tensor, eps: Tensor, wanted: Tensor, abar: float, kind: str) -> Tensor:
    """`prediction`, which implies eps, changed so that it implies `wanted`; all [N, C, ...].

    d v / d eps = 1 / sqrt(abar) and d x_0 / d eps = -sqrt(1 - abar) / sqrt(abar) at fixed x. Only
    the difference is converted: wanted equal to eps changes no bit.
    """
    if kind == "epsilon":
        return wanted
    slope = 1.0 if kind == "v_prediction" else -math.sqrt(1 - abar)
    return prediction + slope / math.sqrt(abar) * (wanted - eps)
