"""diffusers' scheduler classes by what they solve. Nothing here needs torch."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError

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
FLOWS = frozenset({"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"})
STRAIGHT = FLOWS | {"FlowMatchFromOne"}
"""The same of rectified flows; the last is ours, with the steps of FluxPipeline."""
DISTILLED = frozenset({"LCMScheduler", "TCDScheduler"})
"""Schedulers of models that were distilled to take a few steps of that kind, and of no other."""
UNKNOWN_DISTILLED = frozenset({"FlowMatchLCMScheduler", "SCMScheduler"})
"""The same, which none of our names stands for."""
CONSISTENCY = "CMStochasticIterativeScheduler"
"""The class of consistency models (arXiv 2303.01469): every prediction is a clean image."""

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "consistency": ("CMStochasticIterativeScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "dpmsolver-singlestep": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm": ("PNDMScheduler", {}),
    "sa-solver": ("SASolverScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Short name -> diffusers class, and the keys that the name fixes."""


def check_known(own: str, refused: str) -> None:
    """Raise ConfigError for a model's own scheduler class whose place no sampler here can take.

    own: "" for one that nothing is said of. refused: how the message begins.
    """
    if own in UNKNOWN_DISTILLED:
        raise ConfigError(
            f"{refused}, the scheduler of a distilled model: it takes steps of its own kind, which "
            "none of qncd's samplers takes",
            "take the model that it was distilled from",
        )
    if own and own not in DIFFUSION | STRAIGHT | DISTILLED | {CONSISTENCY}:
        raise ConfigError(
            f"{refused}, whose noise levels none of qncd's samplers has",
            f"it samples models made for {', '.join(sorted(DIFFUSION))}, and with flow-euler for "
            f"{', '.join(sorted(FLOWS))}",
        )
