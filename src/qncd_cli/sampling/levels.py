"""Noise levels of every step of a diffusers scheduler: what corrections know about a step.

Notation as in `samplers`: x_t in variance-preserving scale, t -> s, abar, sigma (noise that the
scheduler injects, DDIM eq. 16), c (coefficient of eps in x_s, DDIM eq. 12).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, QncdError
from .parametrization import PARAMETRIZATIONS, prediction_type
from .scheduler_classes import CONSISTENCY, DISTILLED

PNDM_ORDER = 4
"""Runge-Kutta steps that PNDM begins with (arXiv 2202.09778, sec. 3.3)."""
UNPLANNED = DISTILLED | {
    CONSISTENCY,
    "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
}
"""Schedulers whose steps `plan_steps` does not describe: half steps, an x_0 with new noise in every
step, or unlike the others in what of them was tested with corrections."""
BEGIN = "qncd_begin"
"""Attribute of a scheduler: index of the first timestep where a trajectory begins from an image."""
NO_CORRECTION = "set correction.inter.method to none"


@dataclass(frozen=True)
class StepInfo:
    """What a correction may know about one step; levels are Python floats.

    sigma is None where the scheduler injects noise of a size this module does not know.
    velocity: whether corrections see the velocity eps - x_0 of a straight path instead of eps;
    eps_coefficient is then its coefficient.
    number: how many steps before it lowered the noise level; less than index where a scheduler
    makes one step in two calls (PNDM).
    x, the model input x_t [N, C, ...], is set in `Correction.correct` and `observe`; x0 and eps
    only in `observe`: clean latent x0~ implied by the step (after the scheduler's clipping, if it
    reports it), and the corrected prediction that was used, as corrections see it.
    """

    index: int
    t: float
    t_next: float | None  # None at the last step
    abar_t: float
    abar_next: float
    sigma: float | None
    eps_coefficient: float
    velocity: bool = False
    number: int = 0
    x: Tensor | None = None
    x0: Tensor | None = None
    eps: Tensor | None = None

    @property
    def lowers(self) -> bool:
        """Whether the step ends at a lower noise level than it began; PNDM repeats timesteps."""
        return self.abar_next > self.abar_t


def with_timesteps(
    scheduler: Any,
    steps: int,
    eta: float = 0.0,
    device: torch.device | str = "cpu",
    strength: float | None = None,
) -> Any:
    """A copy of the scheduler with the timesteps of a sampler of that many steps.

    strength: share of the steps that is left, the last ones, where a trajectory begins from an
    image; None: all.
    Raises ConfigError if it cannot do what is asked (steps, eta, prediction type).
    """
    kind, most = type(scheduler).__name__, scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise ConfigError(f"sampling.steps is {steps}", f"use 1 to {most}")
    if kind == "PNDMScheduler" and not scheduler.config.skip_prk_steps and steps < PNDM_ORDER:
        raise ConfigError(
            f"{kind} takes no {steps} steps: it begins with {PNDM_ORDER} of another kind",
            f"use sampling.steps of at least {PNDM_ORDER}, or the scheduler plms",
        )
    if eta > 0 and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ConfigError(
            f"{kind} has no eta (sampling.eta is {eta})", "use the ddim scheduler or eta 0"
        )
    if kind == "PNDMScheduler" and prediction_type(scheduler) == "sample":
        raise ConfigError(
            f"{kind} cannot step a model that predicts 'sample'", "use another sampling.scheduler"
        )
    scheduler = copy.deepcopy(scheduler)
    options = {}
    if scheduler.config.get("use_dynamic_shifting", False) and _is_straight(scheduler):
        options["mu"] = scheduler.config.base_shift  # models.schedule: at the size of the images
    with refusals(f"{kind} takes no {steps} steps"):
        scheduler.set_timesteps(steps, device=device, **options)
    last = most - 1 + _is_straight(scheduler)
    first = float(max(scheduler.timesteps))
    discrete = scheduler.config.get("timestep_type", "discrete") == "discrete"
    if first > last and discrete and kind != CONSISTENCY:  # whose timesteps are logarithms
        raise ConfigError(
            f"{kind} takes no {steps} steps: the first would be at timestep {first:g}, "
            f"the model knows 0 to {last}",
            f"use sampling.steps of {steps - 1} or less, or another sampling.scheduler",
        )
    if strength is not None:  # as get_timesteps of diffusers' pipelines does
        begin = max(steps - int(steps * strength), 0) * scheduler.order
        setattr(scheduler, BEGIN, begin)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
    return scheduler


def visited(scheduler: Any) -> Tensor:
    """Timesteps of a scheduler whose timesteps are set that are denoised at.

    The scheduler keeps them all: some solvers count them to know which is the last.
    """
    found: Tensor = scheduler.timesteps[getattr(scheduler, BEGIN, 0) :]
    return found


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Errors of diffusers inside the block become a ConfigError: what, and what diffusers said."""
    try:
        yield
    except QncdError:
        raise
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of as many kinds as schedulers have checks, and lack them
        said = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{what}: {type(error).__name__} {said}".rstrip(),
            "use another sampling.scheduler or other sampling.steps",
        ) from error


def plan_steps(scheduler: Any, eta: float = 0.0) -> list[StepInfo]:
    """Levels of every step of a scheduler whose timesteps are set, for corrections.

    Raises ConfigError where corrections have no meaning: predictions that do not imply eps, or
    schedulers made for other paths that are told to follow a straight one, or a first step at
    abar = 0, where x_t says nothing about x_0 (zero terminal SNR) but the prediction is of it.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    if _is_straight(scheduler):
        return _straight_plan(scheduler)
    if prediction_type(scheduler) not in PARAMETRIZATIONS:
        raise ConfigError(
            f"corrections do not cover a model that predicts {prediction_type(scheduler)!r}",
            NO_CORRECTION,
        )
    if (
        not hasattr(scheduler, "alphas_cumprod")
        or config.get("use_flow_sigmas", False)
        or kind in UNPLANNED
    ):
        raise ConfigError(
            f"corrections do not cover {kind}"
            + (" with flow-matching sigmas" if config.get("use_flow_sigmas", False) else ""),
            NO_CORRECTION,
        )
    levels = _levels(scheduler)
    if min(abar_t for abar_t, _ in levels) <= 0:
        raise ConfigError(
            "corrections do not cover a schedule that starts without any signal (abar = 0)",
            NO_CORRECTION,
        )
    times = [float(t) for t in visited(scheduler)]
    plan: list[StepInfo] = []
    for i, (abar_t, abar_s) in enumerate(levels):
        t_next = times[i + 1] if i + 1 < len(times) else None
        posterior = math.sqrt(max((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s), 0.0))
        sigma = _injected_sigma(scheduler, eta, times[i], abar_t, abar_s, posterior)
        in_mean = posterior if kind == "DDPMScheduler" else sigma or 0.0  # DDPM eq. 7
        c = eps_coefficient(abar_t, abar_s, in_mean)
        number = sum(step.lowers for step in plan)
        plan.append(StepInfo(i, times[i], t_next, abar_t, abar_s, sigma, c, number=number))
    return plan


def _is_straight(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch")


def _straight_plan(scheduler: Any) -> list[StepInfo]:
    """x_s = x_t + (sigma_s - sigma_t) v; abar = (1 - sigma)^2 / ((1 - sigma)^2 + sigma^2).

    At sigma = 1 the velocity still tells of x_0.
    """
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    abar = [(1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2) for sigma in sigmas]
    times = [float(t) for t in scheduler.timesteps]
    injected = _injected_sigma(scheduler, 0.0, 1.0, 0.5, 0.6, 0.1)
    return [
        StepInfo(
            i,
            t,
            times[i + 1] if i + 1 < len(times) else None,
            abar[i],
            abar[i + 1],
            injected,
            sigmas[i + 1] - sigmas[i],
            velocity=True,
            number=i,
        )
        for i, t in enumerate(times)
    ]


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
        abar = abar[getattr(scheduler, BEGIN, 0) :]
        return list(zip(abar, abar[1:], strict=False))
    abar = scheduler.alphas_cumprod.tolist()
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    times = [int(t) for t in visited(scheduler)]
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
    if _is_straight(scheduler):
        return None if scheduler.config.stochastic_sampling else 0.0
    if kind == "DDIMScheduler":
        return eta * posterior
    if kind == "EulerAncestralDiscreteScheduler":  # sigma_up, in VP scale
        return posterior
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
