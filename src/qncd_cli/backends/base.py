"""What can execute a quantized layer, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import BackendUnavailable
from ..quant.layers import QuantizedLayer
from .reference import simulate


@dataclass(frozen=True)
class Backend:
    """compute: (layer, x) -> output; remark: what a user should know before choosing it."""

    name: str
    compute: Callable[[QuantizedLayer, Tensor], Tensor]
    remark: str


BACKENDS = {
    "simulate": Backend(
        "simulate", simulate, "fake quantization in float32, slower than full precision"
    ),
}


def get_backend(name: str) -> Backend:
    """Raises BackendUnavailable that lists the known names."""
    if name not in BACKENDS:
        raise BackendUnavailable(f"no backend {name}", f"known: {', '.join(BACKENDS)}")
    return BACKENDS[name]
