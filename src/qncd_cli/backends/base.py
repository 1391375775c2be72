"""What can execute a quantized layer, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..quant.attention import Matmul
from ..quant.layers import QuantizedLayer
from . import int8
from .cuda import layers as cuda
from .onnx import runtimes
from .reference import forget_weight, simulate

AUTO = "auto"


@dataclass(frozen=True)
class Backend:
    """compute: (layer, x) -> output; remark: what a user should know before choosing it.

    why_unavailable: why it cannot be used for a model on this device, empty where it can;
    why_not: why one layer is simulated instead, empty where it is not; matmul: computes attention's
    products in integers; forget: frees what it keeps with a layer. whole: the denoiser is exported
    to another runtime and runs there as one graph; layer by layer it can only be simulated.
    fuses: --compile joins its layers with what is around them, in a graph for any device.
    by_name: only used where it is asked for; auto and the bench pass it over. way_out: the backend
    to name to a user for whom it is unavailable.
    """

    name: str
    compute: Callable[[QuantizedLayer, Tensor], Tensor]
    remark: str
    why_unavailable: Callable[[torch.device], str] = lambda device: ""
    why_not: Callable[[QuantizedLayer], str] = lambda layer: ""
    matmul: Matmul | None = None
    forget: Callable[[QuantizedLayer], None] = forget_weight
    whole: bool = False
    by_name: bool = False
    fuses: bool = False
    way_out: str = AUTO


def _openvino_unavailable(device: torch.device) -> str:
    if device.type != "cpu":
        return f"it runs on the CPU, the model is on {device.type}"
    missing = runtimes.why_missing(runtimes.FOR_OPENVINO)
    return f"the package {missing} is not installed" if missing else ""


BACKENDS = {
    "int8": Backend(
        "int8",
        int8.compute,
        "integer kernels of oneDNN on the CPU",
        int8.why_unavailable,
        int8.why_not,
        int8.matmul,
        int8.forget_kernel,
    ),
    "simulate": Backend(
        "simulate", simulate, "fake quantization in float32, slower than full precision"
    ),
    "openvino": Backend(
        "openvino",
        simulate,
        "the denoiser's graph in OpenVINO",
        _openvino_unavailable,
        whole=True,
    ),
    cuda.NAME: Backend(
        cuda.NAME,
        cuda.compute,
        "integer kernels in Triton, which have been interpreted and compiled, but have not run on "
        "a GPU yet",
        cuda.why_unavailable,
        cuda.why_not,
        forget=cuda.forget_kernel,
        by_name=True,
        fuses=True,
        way_out="simulate",
    ),
}
"""Backends by name, in the order in which auto tries them where nothing was timed.

Among those that compute layer by layer, the fastest as a rule come first.
"""


def get_backend(name: str, device: str | torch.device = "cpu") -> Backend:
    """The backend of that name, or with auto the first that is available on this device.

    Raises BackendUnavailable that lists the known names, or says why it cannot be used here.
    """
    device = torch.device(device)
    if name == AUTO:
        return _first_available(device)
    if name not in BACKENDS:
        raise BackendUnavailable(f"no backend {name}", f"known: {AUTO}, {', '.join(BACKENDS)}")
    why = BACKENDS[name].why_unavailable(device)
    if why:
        raise BackendUnavailable(
            f"backend {name}: {why}", f"use --backend {BACKENDS[name].way_out}"
        )
    return BACKENDS[name]


def _first_available(device: torch.device) -> Backend:
    """Its remark also says why those before it were passed over."""
    passed_over = []
    for backend in BACKENDS.values():
        if backend.by_name:
            continue
        why = backend.why_unavailable(device)
        if not why:
            break
        passed_over.append(f"{backend.name}: {why}")
    remark = "; ".join([backend.remark, *passed_over])
    return dataclasses.replace(backend, remark=remark)
