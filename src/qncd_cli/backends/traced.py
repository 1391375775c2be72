"""The int8 backend inside a compiled graph: one operator per layer, everything else is open.

The compiler sees smoothing and the quantization of the input and fuses them with what comes
before (normalization, activation function, residual sum) into one pass over memory. The integer
product is an operator that finds its layer by name: packed weights cannot enter a graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..quant.affine import round_to_codes
from ..quant.layers import QuantizedLayer
from ..spec import activation_spec
from . import int8

_layers: weakref.WeakValueDictionary[str, QuantizedLayer] = weakref.WeakValueDictionary()


def register(layers: Mapping[str, QuantizedLayer]) -> None:
    """Let graphs call the layers by these keys, as long as they live."""
    for key, layer in layers.items():
        _layers[key] = layer


@contextmanager
def traceable(layers: Mapping[str, QuantizedLayer]) -> Iterator[None]:
    """In this block the layers compute for a tracer: integer products as operators by key.

    Their packed codes, which only the operators read, are out of sight meanwhile.
    """
    before = {key: (layer.compute, layer.weight) for key, layer in layers.items()}
    try:
        for key, layer in layers.items():
            if int8.why_not(layer):
                continue  # simulated, in floating point that the compiler sees
            layer.compute = _traced(key)
            layer.weight = layer.weight.new_empty(0)
        yield
    finally:
        for key, layer in layers.items():
            layer.compute, layer.weight = before[key]


def _traced(key: str):
    def compute(layer: QuantizedLayer, x: Tensor) -> Tensor:
        """As int8.compute, as operations that the compiler sees."""
        y = layer.smoothed(x if x.dtype == torch.float32 else x.to(torch.float32))
        if layer.is_conv:
            y = y.contiguous(memory_format=torch.channels_last)
        codes = round_to_codes(y, layer.input_qparams(), activation_spec(layer.activation_bits))
        low, high = int8.in_bytes(codes, layer.activation_bits)
        return torch.ops.qncd.multiply(low, high, layer.bias_now(), key, x.dtype)

    return compute


# ------------------------------------------------------------------ the operator

_library = torch.library.Library("qncd", "DEF")
_library.define(
    "multiply(Tensor low, Tensor? high, Tensor? bias, str layer, ScalarType dtype) -> Tensor"
)
_library.define("matmul(Tensor a, Tensor b) -> Tensor")


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a int8 [B, M, K], b int8 [B, K, N] -> a b [B, M, N] int32; traceable."""
    return torch.ops.qncd.matmul(a, b)


def _matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty([a.shape[0], a.shape[1], b.shape[2]], dtype=torch.int32)


def _multiply(
    low: Tensor, high: Tensor | None, bias: Tensor | None, layer: str, dtype: torch.dtype
) -> Tensor:
    """Codes uint8, of one or two bytes, times the weight of the layer of that key.

    Their scale is that of the layer's current timestep group, set by who calls the graph.
    """
    return int8.multiply(_layers[layer], low, high, bias, dtype)


def _multiply_fake(
    low: Tensor, high: Tensor | None, bias: Tensor | None, layer: str, dtype: torch.dtype
) -> Tensor:
    """Shape and memory order of the kernel's output."""
    called = _layers[layer]
    if not called.is_conv:
        return low.new_empty([*low.shape[:-1], called.weight_shape[0]], dtype=dtype)
    return torch.empty(
        int8.conv_output_shape(called, low.shape),
        dtype=dtype,
        device=low.device,
        memory_format=torch.channels_last,
    )


_library.impl("multiply", _multiply, "CPU")
torch.library.register_fake("qncd::multiply", _multiply_fake, lib=_library)
_library.impl("matmul", int8.matmul, "CPU")
torch.library.register_fake("qncd::matmul", _matmul_fake, lib=_library)
