"""Evidence: why values stopped being finite, by what can still be looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import ModelError, NotFinite
from .denoiser_folder import first_not_finite
from .loading import DiffusionModel


@contextmanager
def explained(model: DiffusionModel) -> Iterator[None]:
    """NotFinite inside the block becomes a ModelError that also says the cause.

    The weights are looked at first; whoever raised an error with a hint of its own knew the cause.
    """
    try:
        yield
    except NotFinite as error:
        cause, hint = "", error.hint
        if not hint:
            cause, hint = _cause(model)
        raise ModelError(f"{model.source}: {error.message}{cause}", hint) from error


def _cause(model: DiffusionModel) -> tuple[str, str]:
    """How the message goes on, and the hint."""
    tensor = first_not_finite(model.denoiser)
    if tensor is not None:
        return f": {tensor} of the weights is not finite", "get the weights again"
    if model.dtype == torch.float16:
        largest = torch.finfo(torch.float16).max
        return f": float16 ends at {largest:g}", "set model.dtype: bfloat16 or float32"
    return (
        f": weights and inputs are finite, so {str(model.dtype).removeprefix('torch.')} overflows",
        "lower sampling.guidance_scale, or use another sampling.scheduler or more sampling.steps",
    )
