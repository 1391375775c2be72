"""A U-Net with its ControlNet (arXiv 2302.05543) as one denoiser, and the images that steer it.

The ControlNet becomes a part of the U-Net, by the name CONTROLNET, so that its layers are found,
calibrated and quantized like all others; a hook calls it before the U-Net and hands over what it
adds to the skip connections and to the middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .prompt_length import Tell
from .start_images import check_shapes, opened

CONTROLNET, CONTROL = "controlnet", "control"
"""Name of the ControlNet in its U-Net, and of the argument that it reads."""
PIPELINES = ("StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline")


@dataclass(frozen=True)
class ControlImages:
    """files: one for each prompt in turn; scale: of what the ControlNet adds, 1 for all of it."""

    files: tuple[str, ...]
    scale: float = 1.0


def join(unet: Any, controlnet: Any, scale: float = 1.0) -> nn.Module:
    """The U-Net, which calls the ControlNet itself from now on; its argument is CONTROL.

    CONTROL: [N, 3, H, W] in [0, 1], as large as the image. Raises ModelError for several
    ControlNets in one, and for one that reads its image as one vector.
    """
    kind = type(controlnet).__name__
    if kind != "ControlNetModel":
        raise ModelError(f"a {kind} is not supported", "one ControlNetModel is")
    if controlnet.config.global_pool_conditions:
        raise ModelError(
            "a ControlNet with global_pool_conditions (guess mode) is not supported",
            "take another ControlNet",
        )
    unet.add_module(CONTROLNET, controlnet)
    controlnet.scale = scale
    return unet


def steer(unet: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """A hook before a joined U-Net: what its ControlNet adds to skip connections and middle."""
    own = dict(kwargs)
    control = own.pop(CONTROL)
    named = dict(zip(("sample", "timestep"), args, strict=False)) | own
    passed = ("sample", "timestep", "encoder_hidden_states", "timestep_cond", "added_cond_kwargs")
    read = {name: named[name] for name in passed if name in named}
    down, middle = unet.controlnet(
        **read,
        controlnet_cond=control,
        conditioning_scale=unet.controlnet.scale,
        return_dict=False,
    )
    own["down_block_additional_residuals"] = down
    own["mid_block_additional_residual"] = middle
    return args, own


@torch.no_grad()
def controls(pipeline: Any, request: ControlImages, sides: tuple[int, int], tell: Tell) -> Tensor:
    """[I, 3, H, W] in [0, 1] of the images. sides: height and width of what is drawn, in pixels.

    Images of the same shape and another size are resized as the pipeline does it, which is told.
    Raises ModelError for files that are no images, and for images of another shape.
    """
    images = [opened(file) for file in request.files]
    check_shapes(images, request.files, sides, "control images", tell)
    size = {"height": sides[0], "width": sides[1]}
    return torch.cat([pipeline.control_image_processor.preprocess(one, **size) for one in images])
