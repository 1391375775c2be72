"""The denoising loop over diffusers' own schedulers, with a correction around each step.

Notation (docs/method.md):
    x_t          noisy latent in variance-preserving (VP) scale,
                 x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    t, s         the step's timestep and the level its result is at (the next, less noisy one)
    abar_t       product of (1 - beta) up to t; 1 / (1 + sigma_t^2) in schedulers with sigmas
    sigma        standard deviation of the noise the scheduler injects in this step (DDIM eq. 16)
    c            coefficient by which the predicted eps enters x_s (DDIM eq. 12)

Schedulers in sigma scale (Euler: x = x_0 + sigma * eps) keep their latents in that scale, and their
model sees VP scale; rectified flows have a scale of their own for both. Corrections always see VP
scale and eps, of rectified flows the velocity, whatever the model predicts (`parametrization`).
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import diffusers
import torch
from torch import Tensor

from ..errors import ConfigError
from .families import check_family, without_clipping
from .finite import check_finite
from .flow import FlowMatchFromOne
from .levels import StepInfo, plan_steps, refusals, visited, with_timesteps
from .noise import initial_noise
from .parametrization import (
    FLOW,
    implied_clean,
    path_scale,
    prediction_type,
    to_corrected,
    with_corrected,
)
from .scheduler_classes import SCHEDULERS

OTHER_SAMPLER = (
    "the predictions were finite: use another sampling.scheduler or more sampling.steps, "
    "or lower sampling.guidance_scale"
)
Predict = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor, Tensor, Tensor], None]


class Correction(Protocol):
    """Filters quantization noise out of the predictions of *one* batch; make a new one per batch.

    Every prediction it gets or gives is eps, of rectified flows the velocity; the loop converts
    from what the model predicts and back.

    extra_calls: denoiser calls made by `observe` so far.
    """

    extra_calls: int

    def tries(self, step: StepInfo) -> bool:
        """Whether to make this step on trial first, with the uncorrected prediction.

        `observe` then gets the trial's result, before `correct` is asked, and not the result of the
        step itself.
        """
        ...

    def correct(self, step: StepInfo, prediction: Tensor) -> Tensor:
        """Guided eps [N, C, ...] -> the one to use; called before `scheduler.step`.

        step.x is the model's input.
        """
        ...

    def observe(self, step: StepInfo, x_next: Tensor, predict: Predict) -> None:
        """Called right after `scheduler.step`, except the last; x_next [N, C, ...] in VP scale.

        After a trial it is called at the last step, too.

        predict(x, step.t): guided eps, uncorrected, for x at the level of t; x may be the first
        rows of the batch alone.
        """
        ...

    def deductible_variance(self, step: StepInfo) -> Tensor | None:
        """Variance [N] (or [1]) of the prediction's remaining error, None to deduct nothing.

        Asked only in steps that inject noise, after `correct`. The loop multiplies it by
        c^2 (the scale at which eps enters x_s) and takes it off sigma^2.
        """
        ...


def make_scheduler(name: str, scheduler_config: Mapping[str, Any], **overrides: Any) -> Any:
    """diffusers scheduler by short name, built from the model's own scheduler config.

    Betas, prediction_type, clipping, timestep spacing etc. stay those of `scheduler_config`;
    `overrides` replace single keys. Raises ConfigError for an unknown name, and for one whose
    noise levels are not those of the model (`families`).
    """
    if name not in SCHEDULERS:
        near = difflib.get_close_matches(name, SCHEDULERS, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"unknown scheduler {name!r} in sampling.scheduler",
            f"{guess}known: {', '.join(sorted(SCHEDULERS))}",
        )
    class_name, fixed = SCHEDULERS[name]
    kind = getattr(diffusers, class_name)
    check_family(name, kind, scheduler_config)
    if scheduler_config.get("_class_name") == FlowMatchFromOne.__name__:
        kind = FlowMatchFromOne
    config = without_clipping(scheduler_config)
    config.pop("_class_name", None)
    with refusals(f"{class_name} cannot be made from the model's scheduler_config.json"):
        return kind.from_config({**config, **fixed, **overrides})


@torch.no_grad()
def denoise(
    predict: Predict,
    scheduler: Any,
    steps: int,
    generators: Sequence[torch.Generator],
    shape: Sequence[int],
    *,
    eta: float = 0.0,
    correction: Correction | None = None,
    on_step: OnStep | None = None,
    seeds: Sequence[int] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    start: Tensor | None = None,
    strength: float | None = None,
) -> Tensor:
    """Latents [N, *shape] from noise; the same numbers as a diffusers pipeline's own loop.

    predict(x, t): guided prediction [N, *shape] (eps, x_0 or v, as the scheduler's
        prediction_type says) for the scaled model input x and the timestep t (0-dim tensor);
        guidance and conditioning happen inside.
    scheduler: left untouched (a copy is used), so that no state passes from batch to batch.
    generators: N, one per sample ("sample" stream): initial noise, then the scheduler's draws.
    on_step(i, t, model_input, prediction): called before each step with the prediction used, in
        the model's own parametrization.
    seeds: N, to name samples by in errors.
    start: latents [N, *shape] that are noised to begin with; strength: as `with_timesteps` has it.
    Raises NotFinite as soon as a prediction or a latent is not, ConfigError if the scheduler cannot
    do what is asked (eta, correction, steps).
    """
    scheduler, options = prepared(scheduler, steps, generators, eta, device, strength)
    plan = plan_steps(scheduler, eta) if correction is not None else None
    kind = prediction_type(scheduler)
    x = initial_noise(generators, shape, dtype).to(device)
    if start is None:
        x = x * initial_scale(scheduler)
    else:
        x = scheduler.add_noise(start.to(x), x, visited(scheduler)[:1].expand(len(x)))
    for i, t in enumerate(visited(scheduler)):
        at = f"not finite at step {i + 1} (timestep {float(t):g}) for"
        makes = f"{type(scheduler).__name__} makes latents {at}"
        fails = f"{type(scheduler).__name__} fails at step {i + 1} of {steps}"
        model_input = scaled_input(scheduler, x, t)
        prediction = eps = predict(model_input, t)
        check_finite(prediction, f"the denoiser's prediction is {at}", seeds)
        tried = correction is not None and plan is not None and correction.tries(plan[i])
        if correction is not None and plan is not None:
            abar_t = plan[i].abar_t
            predicted = to_corrected(prediction, model_input, abar_t, kind)
            if tried:
                with refusals(fails):
                    trial = stepped(scheduler, prediction, t, x, options)
                check_finite(trial.prev_sample, makes, seeds, OTHER_SAMPLER)
                at_next = _observed(plan[i], trial, model_input, predicted, kind)
                x_next = trial.prev_sample * to_vp(scheduler, plan[i].abar_next, kind)
                correction.observe(at_next, x_next, _corrected_at(predict, abar_t, kind))
            eps = correction.correct(replace(plan[i], x=model_input), predicted)
            prediction = with_corrected(prediction, predicted, eps, abar_t, kind)
        if on_step is not None:
            on_step(i, t, model_input, prediction)
        deduct = _deduction(correction, plan[i]) if correction is not None and plan else None
        before = _states(generators) if deduct is not None else []
        with refusals(fails):
            output = scheduler.step(prediction, t, x, **options)
        x = output.prev_sample
        check_finite(x, makes, seeds, OTHER_SAMPLER)
        if correction is None or plan is None:
            continue
        if deduct is not None:
            less = _per_sample(deduct, x) * _redraw(before, x)
            x = x - less / to_vp(scheduler, plan[i].abar_next, kind)
        if plan[i].t_next is not None and not tried:
            at_next = _observed(plan[i], output, model_input, eps, kind)
            x_next = x * to_vp(scheduler, plan[i].abar_next, kind)
            correction.observe(at_next, x_next, _corrected_at(predict, plan[i].abar_t, kind))
    return x


def scaled_input(scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
    """The model's input for a latent in the scheduler's own scale."""
    scale = getattr(scheduler, "scale_model_input", None)
    scaled: Tensor = x if scale is None else scale(x, t)
    return scaled


def stepped(
    scheduler: Any, prediction: Tensor, t: Tensor, x: Tensor, options: Mapping[str, Any]
) -> Any:
    """What `scheduler.step` returns, of copies: scheduler and generators stay as they are."""
    options = dict(options)
    if "generator" in options:
        options["generator"] = _in_states(_states(options["generator"]))
    return copy.deepcopy(scheduler).step(prediction, t, x, **options)


def _observed(step: StepInfo, output: Any, model_input: Tensor, eps: Tensor, kind: str) -> StepInfo:
    """The step with what it was made from; output: what `scheduler.step` returned."""
    x0 = getattr(output, "pred_original_sample", None)
    if x0 is None:
        x0 = implied_clean(model_input, eps, step.abar_t, kind)
    return replace(step, x=model_input, x0=x0, eps=eps)


def prepared(
    scheduler: Any,
    steps: int,
    generators: Sequence[torch.Generator],
    eta: float,
    device: torch.device | str,
    strength: float | None = None,
) -> tuple[Any, dict[str, Any]]:
    """A copy of the scheduler with its timesteps set, and the options its `step` takes."""
    if not generators:
        raise ConfigError("no samples to draw", "give at least one seed")
    scheduler = with_timesteps(scheduler, steps, eta, device, strength)
    takes = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"eta": eta, "generator": list(generators)}
    return scheduler, {name: value for name, value in options.items() if name in takes}


def _deduction(correction: Correction, step: StepInfo) -> Tensor | None:
    """sigma - sigma' per sample, sigma'^2 = max(sigma^2 - c^2 var_q, 0); None if nothing to do."""
    if step.sigma == 0.0:
        return None
    var_q = correction.deductible_variance(step)
    if var_q is None:
        return None
    if step.sigma is None:
        raise ConfigError(
            "the variance of the quantization noise cannot be deducted from this scheduler's noise",
            "use ddim or ddpm (fixed variance), or a correction with deduct_variance=False",
        )
    share = (step.eps_coefficient / step.sigma) ** 2 * var_q  # of sigma^2
    return step.sigma * (1 - (1 - share).clamp(min=0).sqrt())


def _redraw(states: Sequence[Tensor], x: Tensor) -> Tensor:
    """The noise z that the scheduler drew from generators that were in `states`, like x."""
    return initial_noise(_in_states(states), x.shape[1:], x.dtype).to(x.device)


def _states(generators: Sequence[torch.Generator]) -> list[Tensor]:
    return [g.get_state() for g in generators]


def _in_states(states: Sequence[Tensor]) -> list[torch.Generator]:
    """Generators that draw what others drew after they were in `states`."""
    clones = [torch.Generator(device="cpu") for _ in states]
    for clone, state in zip(clones, states, strict=True):
        clone.set_state(state)
    return clones


def _corrected_at(predict: Predict, abar_t: float, kind: str) -> Predict:
    """`predict` as corrections see it, for inputs in VP scale at level abar_t."""
    scale = path_scale(abar_t, kind)

    def of(x: Tensor, t: Tensor) -> Tensor:
        x = x * scale
        return to_corrected(predict(x, t), x, abar_t, kind)

    return of


def initial_scale(scheduler: Any) -> float:
    """Standard deviation of the noise that a trajectory starts from."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def to_vp(scheduler: Any, abar: float, kind: str) -> float:
    """Factor from the scheduler's own latent scale at level abar to VP scale."""
    if kind == FLOW:
        return 1 / path_scale(abar, kind)
    in_sigma_scale = initial_scale(scheduler) != 1.0  # Euler: x_0 + sigma * eps
    return math.sqrt(abar) if in_sigma_scale else 1.0


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, ...] on the device and in the dtype of `like`."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))
