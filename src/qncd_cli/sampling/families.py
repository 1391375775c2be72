"""Schedulers that may take each other's place: other solvers on the same noise levels.

diffusers builds any scheduler from the configuration of any other and passes over what it does not
know, so that a model made for other noise levels is sampled at wrong ones without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .scheduler_classes import CONSISTENCY, DISTILLED, STRAIGHT, check_known

LEVELS = {
    "rescale_betas_zero_snr": False,
    "timestep_type": "discrete",
    "use_flow_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
}
"""Keys that change the noise levels, with the value that says nothing."""
SIGMAS = frozenset(f"use_{name}_sigmas" for name in ("karras", "exponential", "beta", "flow"))
"""Keys that say how levels are spaced; diffusers passes over any other without a word."""


def check_family(name: str, wanted: type, config: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a scheduler of class wanted samples what config was made for.

    name: of sampling.scheduler, for the message; config: of the model's own scheduler, whose class
    is its _class_name. One without a class is taken as it is.
    """
    own = str(config.get("_class_name", ""))
    refused = f"sampling.scheduler {name!r} does not fit a model made for {own or 'diffusion'}"
    straight = wanted.__name__ in STRAIGHT
    check_known(own, refused)
    if own in DISTILLED and own != wanted.__name__:
        raise ConfigError(
            f"{refused}, the scheduler of a distilled model, which takes a few steps of that kind",
            f"use {own.removesuffix('Scheduler').lower()}",
        )
    consistency = wanted.__name__ == CONSISTENCY
    if own and (own == CONSISTENCY) != consistency:
        raise ConfigError(
            refused,
            "consistency is for consistency models; use another"
            if consistency
            else "use consistency",
        )
    if (own in STRAIGHT) != straight:
        raise ConfigError(
            refused,
            "flow-euler is for rectified flows; use another" if straight else "use flow-euler",
        )
    for key, value in config.items():
        if key.startswith("use_") and key.endswith("_sigmas") and value and key not in SIGMAS:
            raise ConfigError(
                f"the model's scheduler_config.json has {key}, an unknown sigma schedule",
                f"it may be one of {', '.join(sorted(SIGMAS))}",
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
    clips = not own or "clip_sample" in config or own.startswith(("DDIM", "DDPM", CONSISTENCY))
    return dict(config) if clips else {**config, "clip_sample": False}
