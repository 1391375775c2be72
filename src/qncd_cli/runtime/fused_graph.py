"""A denoiser traced into one graph of the kernels for GPUs, norms and quantizations joined.

On a GPU its launches are recorded for each size of batch and replayed (backends/cuda/recording.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import BackendUnavailable
from .compiled_graph import GraphDenoiser, filled, first_line
from .denoiser import Denoiser


def fuse_denoiser(eager: Denoiser, example: tuple[Tensor, Mapping[str, Tensor]]) -> GraphDenoiser:
    """The denoiser as a graph, made anew in every process: that takes seconds.

    example: x [N, ...] and condition. Raises BackendUnavailable where this model cannot be traced.
    """
    from ..backends.cuda.graph import fused_graph  # brings torch's tracer
    from ..backends.cuda.recording import Recorded

    x, condition = eager.in_own_dtype(*example)
    inputs = filled(eager.to_own_device(x)), {k: filled(v) for k, v in condition.items()}
    try:
        run = fused_graph(eager.module, eager.step, inputs)
    except Exception as error:  # whatever a tracer can stumble over
        raise BackendUnavailable(
            f"the denoiser cannot be traced: {first_line(error)}", "use --no-compile"
        ) from error
    return GraphDenoiser(eager, Recorded(run) if inputs[0].device.type == "cuda" else run)
