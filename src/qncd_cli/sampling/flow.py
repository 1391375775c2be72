"""Steps of rectified flows as FLUX takes them: from sigma 1 to 1 / steps, evenly, then shifted."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler


class FlowMatchFromOne(FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler with the sigmas and the shift that FluxPipeline gives it for each run.

    base_shift: of its configuration, the shift mu at the size of the images that are drawn.
    """

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps, dtype=torch.double)
        mu = self.config.base_shift if self.config.use_dynamic_shifting else None
        super().set_timesteps(sigmas=sigmas.tolist(), device=device, mu=mu)
