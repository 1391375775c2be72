"""The denoising loop over diffusers' own schedulers, with a correction around each step.

Notation (method.md sections 1 and 3):
    x_t          noisy latent in variance-preserving (VP) scale,
                 x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    t, s         the step's timestep and the level its result is at (the next, less noisy one)
    abar_t       product of (1 - beta) up to t; 1 / (1 + sigma_t^2) in schedulers with sigmas
    sigma        standard deviation of the noise the scheduler injects in this step (DDIM eq. 16)
    c            coefficient by which the predicted eps enters x_s (DDIM eq. 12)

Schedulers in sigma scale (Euler: x = x_0 + sigma * eps) keep their latents in that scale;
the model, the recorder and the corrections always see VP scale.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import diffusers
import torch
from torch import Tensor

from ..errors import ConfigError
from .noise import initial_noise

Predict = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class StepInfo:
    """What a correction may know about one step; levels are Python floats.

    sigma is None where the scheduler injects noise of a size this module does not know.
    x, x0 and prediction are set only in `Correction.observe`: model input x_t [N, C, ...],
    clean latent x0~ implied by the step (after the scheduler's clipping, if it reports it),
    and the corrected prediction that was used.
    """

    index: int
    t: float
    t_next: float | None  # None at the last step
    abar_t: float
    abar_next: float
    sigma: float | None
    eps_coefficient: float
    x: Tensor | None = None
    x0: Tensor | None = None
    prediction: Tensor | None = None


class Correction(Protocol):
    """Filters quantization noise out of the predictions of *one* batch; make a new one per batch.

    extra_calls: denoiser calls made by `observe` so far.
    """

    extra_calls: int

    def correct(self, step: StepInfo, prediction: Tensor) -> Tensor:
        """Guided prediction [N, C, ...] -> the one to use; called before `scheduler.step`."""
        ...

    def observe(self, step: StepInfo, x_next: Tensor, predict: Predict) -> None:
        """Called right after `scheduler.step`, except the last; x_next [N, C, ...] in VP scale."""
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
    `overrides` replace single keys. Raises ConfigError for an unknown name.
    """
    if name not in SCHEDULERS:
        near = difflib.get_close_matches(name, SCHEDULERS, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"unknown scheduler {name!r} in sampling.scheduler",
            f"{guess}known: {', '.join(sorted(SCHEDULERS))}",
        )
    class_name, fixed = SCHEDULERS[name]
    config = {k: v for k, v in scheduler_config.items() if k != "_class_name"}
    return getattr(diffusers, class_name).from_config({**config, **fixed, **overrides})


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
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Latents [N, *shape] from noise; the same numbers as a diffusers pipeline's own loop.

    predict(x, t): guided noise prediction [N, *shape] for the scaled model input x and the
        timestep t (0-dim tensor); guidance and conditioning happen inside.
    scheduler: left untouched (a copy is used), so that no state passes from batch to batch.
    generators: N, one per sample ("sample" stream): initial noise, then the scheduler's draws.
    on_step(i, t, model_input, prediction): called before each step with the prediction used.
    Raises ConfigError if the scheduler cannot do what is asked (eta, correction, steps).
    """
    scheduler, options = _prepare(scheduler, steps, generators, eta, device)
    plan = plan_steps(scheduler, eta) if correction is not None else None
    x = initial_noise(generators, shape, dtype).to(device) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(x, t)
        prediction = predict(model_input, t)
        if correction is not None and plan is not None:
            prediction = correction.correct(plan[i], prediction)
        if on_step is not None:
            on_step(i, t, model_input, prediction)
        if correction is None or plan is None:
            x = scheduler.step(prediction, t, x, **options).prev_sample
            continue
        deduct = _deduction(correction, plan[i])
        before = [g.get_state() for g in generators] if deduct is not None else []
        output = scheduler.step(prediction, t, x, **options)
        x = output.prev_sample
        if deduct is not None:
            x = x - _per_sample(deduct, x) * _redraw(before, x)
        if plan[i].t_next is not None:
            x0 = getattr(output, "pred_original_sample", None)
            step = _completed(plan[i], model_input, x0, prediction)
            correction.observe(step, x * _to_vp(scheduler, step.abar_next), predict)
    return x


def plan_steps(scheduler: Any, eta: float = 0.0) -> list[StepInfo]:
    """Levels of every step of a scheduler whose timesteps are set, for corrections.

    Raises ConfigError where corrections have no meaning: predictions that are not eps, or
    schedulers whose latents are not on a variance-preserving path (flow matching).
    """
    config, kind = scheduler.config, type(scheduler).__name__
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise ConfigError(
            f"corrections need a model that predicts eps, not {config.prediction_type!r}",
            "set correction.inter.method to none",
        )
    if not hasattr(scheduler, "alphas_cumprod") or config.get("use_flow_sigmas", False):
        raise ConfigError(f"corrections do not cover {kind}", "set correction.inter.method to none")
    levels = _levels(scheduler)
    if min(abar_t for abar_t, _ in levels) <= 0:
        raise ConfigError(
            "corrections do not cover a schedule that starts without any signal (abar = 0)",
            "set correction.inter.method to none",
        )
    times = [float(t) for t in scheduler.timesteps]
    plan = []
    for i, (abar_t, abar_s) in enumerate(levels):
        t_next = times[i + 1] if i + 1 < len(times) else None
        posterior = math.sqrt(max((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s), 0.0))
        sigma = _injected_sigma(scheduler, eta, times[i], abar_t, abar_s, posterior)
        in_mean = posterior if kind == "DDPMScheduler" else sigma or 0.0  # DDPM eq. 7
        c = eps_coefficient(abar_t, abar_s, in_mean)
        plan.append(StepInfo(i, times[i], t_next, abar_t, abar_s, sigma, c))
    return plan


def eps_coefficient(abar_t: float, abar_s: float, sigma: float) -> float:
    """c in x_s = sqrt(abar_s / abar_t) x_t + c eps + sigma z; DDIM (2010.02502) eq. 12."""
    direction = math.sqrt(max(1 - abar_s - sigma**2, 0.0))
    return direction - math.sqrt(abar_s) * math.sqrt(1 - abar_t) / math.sqrt(abar_t)


def supports_variance_deduction(scheduler: Any, eta: float = 0.0) -> bool:
    """Whether the size of the noise this scheduler injects is known (0 counts as known)."""
    return _injected_sigma(scheduler, eta, 1.0, 0.5, 0.6, 0.1) is not None


def _levels(scheduler: Any) -> list[tuple[float, float]]:
    """(abar_t, abar_next) of every step.

    In sigma schedulers these are neighbouring sigmas. DDIM arrives at t - T // steps, which is
    the next timestep only with "leading" spacing. Else x after step i is at timesteps[i + 1];
    that holds for the timesteps PNDM repeats, too (abar_next == abar_t in such a step); its
    Runge-Kutta half steps are one training step off where T // steps is odd.
    """
    if hasattr(scheduler, "sigmas"):
        abar = [1 / (1 + float(sigma) ** 2) for sigma in scheduler.sigmas]
        return list(zip(abar, abar[1:], strict=False))
    abar = scheduler.alphas_cumprod.tolist()
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    times = [int(t) for t in scheduler.timesteps]
    following = [*times[1:], -1]
    if type(scheduler).__name__ == "DDIMScheduler":
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        following = [t - stride for t in times]
    return [(abar[t], abar[s] if s >= 0 else final) for t, s in zip(times, following, strict=True)]


def _injected_sigma(
    scheduler: Any, eta: float, t: float, abar_t: float, abar_s: float, posterior: float
) -> float | None:
    """Standard deviation of the noise injected between t and s, None if not known.

    posterior: sqrt of beta~ = (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s), DDPM eq. 7.
    """
    kind = type(scheduler).__name__
    if kind == "DDIMScheduler":
        return eta * posterior
    if kind == "DDPMScheduler":
        fixed = {
            "fixed_small": posterior,
            "fixed_small_log": posterior,
            "fixed_large": math.sqrt(1 - abar_t / abar_s),
        }
        return fixed.get(scheduler.config.variance_type) if t > 0 else 0.0
    if kind == "DPMSolverMultistepScheduler":
        return None if scheduler.config.algorithm_type.startswith("sde") else 0.0
    if kind == "EulerDiscreteScheduler":  # s_churn = 0
        return 0.0
    return None if "generator" in inspect.signature(scheduler.step).parameters else 0.0


def _prepare(
    scheduler: Any,
    steps: int,
    generators: Sequence[torch.Generator],
    eta: float,
    device: torch.device | str,
) -> tuple[Any, dict[str, Any]]:
    """A copy of the scheduler with its timesteps set, and the options its `step` takes."""
    if not generators:
        raise ConfigError("no samples to draw", "give at least one seed")
    most = scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise ConfigError(f"sampling.steps is {steps}", f"use 1 to {most}")
    takes = inspect.signature(scheduler.step).parameters
    if eta > 0 and "eta" not in takes:
        raise ConfigError(
            f"{type(scheduler).__name__} has no eta (sampling.eta is {eta})",
            "use the ddim scheduler or eta 0",
        )
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=device)
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
    clones = [torch.Generator(device="cpu") for _ in states]
    for clone, state in zip(clones, states, strict=True):
        clone.set_state(state)
    return initial_noise(clones, x.shape[1:], x.dtype).to(x.device)


def _completed(step: StepInfo, x: Tensor, x0: Tensor | None, prediction: Tensor) -> StepInfo:
    """`step` with its tensors; x0~ = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t) if not given."""
    if x0 is None:
        x0 = (x - math.sqrt(1 - step.abar_t) * prediction) / math.sqrt(step.abar_t)
    return replace(step, x=x, x0=x0, prediction=prediction)


def _to_vp(scheduler: Any, abar: float) -> float:
    """Factor from the scheduler's own latent scale at level abar to VP scale."""
    in_sigma_scale = float(scheduler.init_noise_sigma) != 1.0  # Euler: x_0 + sigma * eps
    return math.sqrt(abar) if in_sigma_scale else 1.0


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, ...] on the device and in the dtype of `like`."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Short name -> diffusers class, and the keys that the name fixes."""
