"""How far a sampler's step carries a change of the prediction."""

from __future__ import annotations

import copy
from typing import Any

import torch

from .levels import plan_steps
from .noise import generator_for
from .parametrization import prediction_type, to_corrected, with_corrected
from .samplers import prepared, scaled_input, stepped, to_vp


def responses(scheduler: Any, steps: int, eta: float = 0.0) -> list[float]:
    """r of every step: one unit more of the prediction adds r to the latent after it.

    Prediction as corrections see it (eps, or the velocity), latent in VP scale. Schedulers add
    multiples of their predictions, those that look back too, so that r depends on neither latent
    nor prediction; it is read off a step of zeros. Raises ConfigError as `plan_steps` does.
    """
    scheduler, options = prepared(scheduler, steps, [generator_for(0)], eta, "cpu")
    plan, kind = plan_steps(scheduler, eta), prediction_type(scheduler)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    found = []
    for step, t in zip(plan, scheduler.timesteps, strict=True):
        model_input = scaled_input(scheduler, x, t)
        prediction = torch.zeros_like(x)
        own = to_corrected(prediction, model_input, step.abar_t, kind)
        more = with_corrected(prediction, own, own + 1, step.abar_t, kind)
        ends = [stepped(scheduler, p, t, x, options).prev_sample for p in (prediction, more)]
        found.append(float(ends[1] - ends[0]) * to_vp(scheduler, step.abar_next, kind))
        x = copy.copy(scheduler.step(prediction, t, x, **options).prev_sample)
    return found


def carried(scheduler: Any, steps: int, eta: float = 0.0) -> list[float]:
    """a of every step: one unit more of the latent adds a to the latent after it, where the
    prediction, as corrections see it, stays the same. Both latents in VP scale; as `responses`.
    """
    scheduler, options = prepared(scheduler, steps, [generator_for(0)], eta, "cpu")
    plan, kind = plan_steps(scheduler, eta), prediction_type(scheduler)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    found = []
    for step, t in zip(plan, scheduler.timesteps, strict=True):
        ends = []
        for x in (zero, zero + 1):
            model_input = scaled_input(scheduler, x, t)
            own = to_corrected(zero, model_input, step.abar_t, kind)
            same = with_corrected(zero, own, zero, step.abar_t, kind)
            ends.append(stepped(scheduler, same, t, x, options).prev_sample)
        scales = [to_vp(scheduler, abar, kind) for abar in (step.abar_next, step.abar_t)]
        found.append(float(ends[1] - ends[0]) * scales[0] / scales[1])
        scheduler.step(zero, t, zero, **options)
    return found
