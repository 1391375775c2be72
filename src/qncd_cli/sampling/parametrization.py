"""What a denoiser may predict about x_t, and in which of it corrections work.

In variance-preserving (VP) scale, with x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps:
    epsilon         eps, the noise itself (DDPM, 2006.11239)
    sample          x_0, the clean latent
    v_prediction    v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans & Ho, 2202.00512)
On a straight path, x_t = (1 - sigma_t) x_0 + sigma_t eps, which is VP times `path_scale`:
    flow_prediction v = eps - x_0 (rectified flow, 2209.03003; SD3, 2403.03206)
At a given x_t each is an affine function of each other one. Corrections work in eps, but for
flow_prediction in the velocity itself: such models start at sigma = 1, where x_t is eps and a
prediction of it says nothing.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

FLOW = "flow_prediction"
PARAMETRIZATIONS = ("epsilon", "sample", "v_prediction")
"""Prediction types of models whose noise levels are those of a VP path."""


def prediction_type(scheduler: Any) -> str:
    """What the scheduler takes the model to predict, in diffusers' words."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return FLOW
    return str(scheduler.config.get("prediction_type", "epsilon"))


def path_scale(abar: float, kind: str) -> float:
    """Factor from VP scale to that of the latents that a model predicting `kind` reads.

    With sigma / (1 - sigma) = sqrt((1 - abar) / abar): sqrt((1 - sigma)^2 + sigma^2).
    """
    return 1 / (math.sqrt(abar) + math.sqrt(1 - abar)) if kind == FLOW else 1.0


def to_corrected(prediction: Tensor, x: Tensor, abar: float, kind: str) -> Tensor:
    """What corrections see of a prediction: the noise in x, or the velocity on a straight path.

    prediction, x: [N, C, ...], x in VP scale at level 0 < abar < 1 (FLOW: not looked at).
    """
    if kind in ("epsilon", FLOW):
        return prediction
    if kind == "v_prediction":
        return math.sqrt(abar) * prediction + math.sqrt(1 - abar) * x
    return (x - math.sqrt(abar) * prediction) / math.sqrt(1 - abar)


def with_corrected(
    prediction: Tensor, own: Tensor, wanted: Tensor, abar: float, kind: str
) -> Tensor:
    """`prediction`, of which corrections saw `own`, changed so that it says `wanted`; [N, C, ...].

    d v / d eps = 1 / sqrt(abar) and d x_0 / d eps = -sqrt(1 - abar) / sqrt(abar) at fixed x. Only
    the difference is converted: wanted equal to own changes no bit.
    """
    if kind in ("epsilon", FLOW):
        return wanted
    slope = 1.0 if kind == "v_prediction" else -math.sqrt(1 - abar)
    return prediction + slope / math.sqrt(abar) * (wanted - own)


def implied_clean(x: Tensor, corrected: Tensor, abar: float, kind: str) -> Tensor:
    """x_0 that a (corrected) prediction about x implies.

    (x - sqrt(1 - abar) eps) / sqrt(abar); x - sigma v on a straight path, x in its scale.
    """
    if kind == FLOW:
        return x - math.sqrt(1 - abar) * path_scale(abar, kind) * corrected
    return (x - math.sqrt(1 - abar) * corrected) / math.sqrt(abar)
