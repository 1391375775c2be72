"""Schedulers that may take each other's place: other solvers on the same noise levels.

diffusers builds any scheduler from the configuration of any other and passes over what it does not
know, so that a model made for other noise levels is sampled at wrong ones without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .flow import FlowMatchFromOne

DIFFUSION = frozenset(
    {
        "DDIMScheduler",
        "DDIMParallelScheduler",
        "DDPMScheduler",
        "DDPMParallelScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "UniPCMultistepScheduler",
    }
)
"""They differ by the solver alone: betas and what the model predicts are those of the folder."""
STRAIGHT = frozenset(
    {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", FlowMatchFromOne.__name__}
)
"""The same of rectified flows."""
DISTILLED = frozenset({"LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "SCMScheduler"})
"""Of models that were distilled to take a few steps of their own kind."""
LEVELS = {
    "rescale_betas_zero_snr": False,
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
}
"""Keys that change the noise levels, with the value that says nothing."""


def check_family(name: str, wanted: type, config: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a scheduler of class wanted samples what config was made for.

    name: of sampling.scheduler, for the message; config: of the model's own scheduler, whose class
    is its _class_name. One without a class is taken as it is.
    """
    own = str(config.get("_class_name", ""))
    refused = f"sampling.scheduler {name!r} does not fit a model made for {own or 'diffusion'}"
    straight = wanted.__name__ in STRAIGHT
    if own in DISTILLED:
        raise ConfigError(
            f"{refused}, the scheduler of a distilled model: it takes steps of its own kind, which "
            "none of qncd's samplers takes",
            "take the model that it was distilled from",
        )
    if own and own not in DIFFUSION | STRAIGHT:
        raise ConfigError(
            f"{refused}, whose noise levels none of qncd's samplers has",
            f"it samples models made for {', '.join(sorted(DIFFUSION))}, and with flow-euler for "
            f"{', '.join(sorted(STRAIGHT - {FlowMatchFromOne.__name__}))}",
        )
    if (own in STRAIGHT) != straight:
        raise ConfigError(
            refused,
            "flow-euler is for rectified flows; use another" if straight else "use flow-euler",
        )
    known = inspect.signature(wanted).parameters
    for key, nothing in LEVELS.items():
        value = config.get(key, nothing)
        if not straight and value != nothing and key not in known:
            raise ConfigError(
                f"{refused} with {key} {value}, which {wanted.__name__} does not know",
                "use another sampling.scheduler",
            )


def without_clipping(config: Mapping[str, Any]) -> dict[str, Any]:
    """Schedulers that know clip_sample would clip where the model's own, which does not, never did.

    A configuration that says something of it, or names no class, stays as it is.
    """
    own = config.get("_class_name", "")
    clips = not own or "clip_sample" in config or own.startswith(("DDIM", "DDPM"))
    return dict(config) if clips else {**config, "clip_sample": False}
