"""The cuda-int8 backend: layers computed by the kernels, and why they cannot be.

The integers are those of backends/int8.py, and they are scaled by the operations of
backends/reference.py in the same order: the result is the simulation's bit for bit. Where weights
alone are quantized the input stays as it is: float sums, in another order than the simulation's.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from ...errors import BackendUnavailable
from ...quant.layers import QuantizedLayer
from ...quant.rotation import rotate
from ...spec import FLOAT_BITS
from ..reference import simulate
from . import launch, ops, weights
from .tiles import OLDEST

NAME = "cuda-int8"
KERNEL = "cuda-int8 weight"
"""Name under which a layer keeps its weights as the kernels read them."""
INTERPRET = "TRITON_INTERPRET"
LARGEST_SUM = 2**31
"""Sums are int32."""
LARGEST_PRODUCT = 255 * 127
"""Largest product of an input's code less its zero-point and a weight."""


def compute(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """x of any float dtype -> output of the same dtype; simulated where why_not has a reason.

    Raises BackendUnavailable where the device's memory does not suffice.
    """
    if why_not(layer):
        return simulate(layer, x)
    try:
        return _compute(layer, x)
    except torch.OutOfMemoryError as error:
        raise BackendUnavailable(
            f"backend {NAME}: {x.device} has too little memory for a layer with the weight "
            f"{list(layer.weight_shape)} and the input {list(x.shape)}",
            "draw fewer samples at once (--batch-size), or use --backend simulate",
        ) from error


def _compute(layer: QuantizedLayer, x: Tensor) -> Tensor:
    if layer.activation_bits == FLOAT_BITS:
        return _weights_alone(layer, x)
    dtype = x.dtype
    if layer.rotation:
        x = rotate(x.to(torch.float32), layer.rotation)
    scale, zero_point = layer.input_qparams()
    zero_point = zero_point.to(torch.int32)  # inputs of a graph are all float32
    quantizer = layer.smoothing, layer.shift, scale, zero_point, layer.activation_bits
    low, high = ops.BYTES(x, layer.is_conv, *quantizer)
    inputs = [(low, False), (high, True)] if layer.activation_bits > 8 else [(low, False)]
    passes = [(*codes, weight) for codes in inputs for weight in prepare(layer)]
    bias, form, output = layer.bias_now(), geometry(layer), None
    for codes, is_high, weight in passes:
        output = ops.BYTE_PRODUCT(
            codes,
            weight.codes,
            weight.zero_point,
            weight.scale,
            weight.sums,
            bias,
            scale,
            zero_point,
            form,
            torch.float32 if len(passes) > 1 else dtype,
            high=is_high,
            input_scale_first=weight.input_scale_first,
            before=output,
        )
        bias = None
    assert output is not None
    output = output.permute(0, 3, 1, 2) if layer.is_conv else output
    return output.to(dtype)


def _weights_alone(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """The input stays as it is, in its own type unless something is done to it in float32."""
    changed = layer.smoothing is not None or layer.rotation
    y = layer.smoothed(x.to(torch.float32)) if changed else x
    y = y.permute(0, 2, 3, 1) if layer.is_conv else y
    bias, form, output = layer.bias_now(), geometry(layer), None
    parts = prepare(layer)
    kind = torch.float32 if len(parts) > 1 else x.dtype
    for part in parts:
        weight = part.codes, part.zero_point, part.scale, part.sums
        output = ops.FLOAT_PRODUCT(y, *weight, bias, form, kind, output)
        bias = None
    assert output is not None
    output = output.permute(0, 3, 1, 2) if layer.is_conv else output
    return output.to(x.dtype)


def geometry(layer: QuantizedLayer) -> list[int]:
    """Height and width of a convolution's kernel, stride, padding, dilation; empty for linear."""
    if not layer.is_conv:
        return []
    assert not isinstance(layer.padding, str)  # why_not has refused it
    return [*layer.weight_shape[2:], *layer.stride, *layer.padding, *layer.dilation]


def prepare(layer: QuantizedLayer) -> list[weights.Weight]:
    """The layer's weights as the kernels read them, made on first use and kept unless memory is
    dear."""
    found: list[weights.Weight] | None = layer.prepared.get(KERNEL)
    if found is None or found[0].codes.device != layer.weight.device:
        found = weights.prepared(layer)
        if not layer.low_memory:
            layer.prepared[KERNEL] = found
    return found


def forget_kernel(layer: QuantizedLayer) -> None:
    """Free what the layer keeps for the kernels; the next call prepares it again."""
    layer.prepared.pop(KERNEL, None)


def why_not(layer: QuantizedLayer) -> str:
    """Why a layer is simulated instead; empty where the kernels compute it."""
    if layer.weight_bits == FLOAT_BITS:
        return "its weight is not quantized"
    if layer.is_conv and isinstance(layer.padding, str):
        return f"padding {layer.padding} is given by name"
    if layer.is_conv and layer.groups > 1:
        return f"it is a convolution in {layer.groups} groups"
    if layer.activation_bits == FLOAT_BITS:
        return ""
    if math.prod(layer.weight_shape[1:]) * LARGEST_PRODUCT >= LARGEST_SUM:
        return "sums of so many products may not fit 32 bits"
    return ""


# ------------------------------------------------------------------ this machine


def why_unavailable(device: torch.device) -> str:
    """Why the kernels cannot be used for a model on this device; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if launch.interpreted():
        return "" if device.type == "cpu" else f"{INTERPRET}=1 interprets kernels on the CPU alone"
    if device.type != "cuda":
        return f"its kernels are for NVIDIA's GPUs, the model is on {device.type}"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return _too_old(torch.cuda.get_device_capability(device))


def _too_old(capability: tuple[int, int]) -> str:
    """Empty for the architectures that Triton has a product of bytes for."""
    number = 10 * capability[0] + capability[1]
    return f"it needs sm_{OLDEST} or newer, this GPU is sm_{number}" if number < OLDEST else ""
