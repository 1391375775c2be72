"""How a graph is called: its inputs, which of their sizes are open, and what computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE, TIMESTEP, PREDICTION = "sample", "timestep", "prediction"
BATCH_RANGE = (2, 63)
"""Numbers of rows to trace for; the graph takes any. diffusers' upsampling has two ways to compute
the same, and takes the other one from 64 rows on."""

Inputs = Mapping[str, Tensor]
Sizes = Mapping[str, Mapping[int, Any]]
"""Input -> its open dimensions, each a torch.export.Dim or a multiple of one."""


@dataclass(frozen=True)
class Signature:
    """What a graph takes and gives.

    inputs: examples by name, in the graph's order; call: (module, inputs) -> outputs, as many as
    there are names.
    """

    inputs: Inputs
    sizes: Sizes
    outputs: Sequence[str]
    call: Callable[[nn.Module, Inputs], Any]


@dataclass(frozen=True)
class DenoiserSignature(Signature):
    """What a denoiser's graph takes and gives.

    timestep: inputs -> the timestep of all rows, 0 to 1000, one number.
    """

    timestep: Callable[[Inputs], Tensor]


def own_signature(x: Tensor, condition: Inputs) -> DenoiserSignature:
    """The call of a denoiser in this package: the number of rows is open, and nothing else.

    x [N, ...] and its condition: examples, N at least 2, float32.
    """
    inputs = {SAMPLE: x, TIMESTEP: torch.zeros(len(x)), **condition}
    batch = {0: torch.export.Dim("batch", min=BATCH_RANGE[0], max=BATCH_RANGE[1])}
    return DenoiserSignature(
        inputs, dict.fromkeys(inputs, batch), [PREDICTION], _call, lambda given: given[TIMESTEP][0]
    )


def _call(module: nn.Module, inputs: Inputs) -> Tensor:
    condition = {k: v for k, v in inputs.items() if k not in (SAMPLE, TIMESTEP)}
    prediction: Tensor = module(inputs[SAMPLE], inputs[TIMESTEP], **condition).sample
    return prediction
