"""Steps of rectified flows as FLUX takes them: from sigma 1 to 1 / steps, evenly, then shifted."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


class FlowMatchFromOne(FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler with the sigmas that FluxPipeline gives it for each run."""

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        mu: float | None = None,
    ) -> None:
        """mu: shift at the size of the images, where the configuration leaves it to the caller."""
        sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps, dtype=torch.double)
        super().set_timesteps(sigmas=sigmas.tolist(), device=device, mu=mu)
