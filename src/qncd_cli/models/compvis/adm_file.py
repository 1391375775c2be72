"""Checkpoints of guided-diffusion and of consistency models as pipelines of diffusers.

The files are a U-Net's tensors alone. What their programs are told on the command line is the
default here: 1,000 steps with linear betas (guided_diffusion/script_util.py of
github.com/openai/guided-diffusion), and the noise levels of github.com/openai/consistency_models.
"""

from __future__ import annotations

from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
)

from ...errors import ModelError
from .adm import ADMOptions, adm_unet
from .file import read_tensors

LEVELS = {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0}
BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def adm_pipeline(
    file: str, image_size: int, head_channels: int = 64, *, consistency: bool = False
) -> DiffusionPipeline:
    """The pipeline of a U-Net's file, in its stored precision.

    image_size: the side of its images; head_channels: of its attention; consistency: whether it is
    a consistency model, else it predicts noise. Raises ModelError.
    """
    options = ADMOptions(image_size, head_channels, stacked=consistency)
    unet = adm_unet(read_tensors(file), options, file).eval()
    if consistency:
        return ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler(**LEVELS))
    if unet.config.num_class_embeds is not None:
        raise ModelError(
            f"{file}: has {unet.config.num_class_embeds} classes and no null class",
            "guided-diffusion's models without classes are read, and consistency models",
        )
    return DDIMPipeline(unet, DDIMScheduler(**BETAS, clip_sample=True, set_alpha_to_one=True))
