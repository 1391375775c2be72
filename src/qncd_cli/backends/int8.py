"""The int8 backend: integer convolutions and matrix products on the CPU, by oneDNN through torch.

x ~ (q - zero_point) * scale with q uint8, W ~ w * weight_scale[o] with w int8: oneDNN adds up the
products (q - zero_point) * w in int32 and scales the sums to float32. These are the integers that
the simulate backend fakes, scaled by the same operations: the two give the same bits, but for
kernels that oneDNN has for small matrices and grouped convolutions.
Inputs of more than 8 bits are two bytes, q = 256 high + low, in two passes over the same weight;
weights of 15 bits are two as well, w = 128 high + low. On CPUs without VNNI, weights of 8 bits and
more are parts of 6 bits if inputs have more than 7 (`onednn.weight_parts`).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..quant.affine import quantize_two_bytes, quantize_uint8
from ..quant.integer_products import fast_in_integers, integer_product
from ..quant.layers import QuantizedLayer
from ..spec import FLOAT_BITS
from .onednn import output_as, weight_parts, why_unusable, writes_bfloat16
from .reference import simulate

SWITCH = "QNCD_DISABLE_INT8"
"""Environment variable; 1 makes the backend unavailable."""
KERNEL = "int8 kernel"
"""Name under which a layer keeps what is prepared for it here."""
WORTH_A_TRIAL = 2**20
"""Weights of a convolution from which its kernel is timed with outputs of both types."""
Geometry = tuple[list[int], list[int], list[int], int]
"""stride, padding, dilation, groups"""
MUCH_SLOWER = 1.5
"""Times as long as with float32; putting the weight in order takes more than this."""
LARGE_ROW = 48 * 1024
"""Values in a row of an image from which a convolution is timed with rows of padding of ours."""
TRIAL_ROWS = 8
"""Rows of an image that such a trial computes."""
PADDING_COSTS = 1.25
"""Times as long as without rows of padding; copying the codes for them takes less than this."""


# ------------------------------------------------------------------ one layer


@dataclass
class Kernel:
    """What a layer's products need at every call, made once.

    weights: int8 in oneDNN's own order and its scale [O], one pair for each part of `weight_parts`;
    weight_zero_point: zeros [O]; geometry: of a convolution; input_scale, input_zero_point: one
    number per timestep group (graphs bring theirs); rounds: whether the operator itself writes
    bfloat16 in good time, found out when that is first asked for; upsampled: the input is an image
    whose pixels are to be doubled; rows: of padding that the codes get above and below before the
    operator has them, which is padding that geometry has no more.
    """

    weights: list[tuple[Tensor, Tensor]]
    weight_zero_point: Tensor
    geometry: Geometry | None
    input_scale: list[float] = field(default_factory=list)
    input_zero_point: list[int] = field(default_factory=list)
    rounds: bool | None = None
    upsampled: bool = False
    rows: int = 0


def compute(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """x of any float dtype -> output of the same dtype; simulated where why_not has a reason."""
    if why_not(layer):
        return simulate(layer, x)
    y = layer.smoothed(x.to(torch.float32))
    bits, high, group = layer.activation_bits, None, layer.step.group
    kernel = _kernel(layer, y)
    quantizer = kernel.input_scale[group], kernel.input_zero_point[group], bits
    if bits <= 8:
        low = quantize_uint8(y, *quantizer)
    else:
        low, high = quantize_two_bytes(y, *quantizer)
    return _multiply(layer, kernel, low, high, layer.bias_now(), x.dtype)


def in_bytes(codes: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Codes of up to 16 bits, in any type that holds them -> low byte and high byte, if any."""
    if bits <= 8:
        return codes.to(torch.uint8), None
    codes = codes.to(torch.int32)
    return (codes & 255).to(torch.uint8), (codes >> 8).to(torch.uint8)


def prepare(layer: QuantizedLayer, low: Tensor, dtype: torch.dtype) -> Kernel:
    """What a graph needs of a layer with codes like `low` and an output of that type."""
    kernel = _kernel(layer, low)
    if dtype == torch.bfloat16 and layer.activation_bits <= 8 and len(kernel.weights) == 1:
        _multiply(layer, kernel, low, None, None, dtype)
    return kernel


def _multiply(
    layer: QuantizedLayer,
    kernel: Kernel,
    low: Tensor,
    high: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Codes uint8 [N, C, ...] or [..., C], of one or two bytes, times the layer's weight.

    The codes have the scale and zero-point of the current timestep group. dtype: of the result,
    which is rounded to it once; sums of several passes are float32 until then.
    """
    group = layer.step.group
    scale, zero_point = kernel.input_scale[group], kernel.input_zero_point[group]
    inputs = [(low, scale, zero_point & 255)]
    if high is not None:
        inputs.append((high, 256 * scale, zero_point >> 8))
    passes = [(*codes, *weight) for codes in inputs for weight in kernel.weights]
    native = torch.float32
    if dtype == torch.bfloat16 and len(passes) == 1:
        if kernel.rounds is None:
            kernel.rounds = _rounds(layer, partial(_pass, kernel, *passes[0], bias))
        native = dtype if kernel.rounds else native
    output = _pass(kernel, *passes[0], bias, native)
    for operands in passes[1:]:
        output += _pass(kernel, *operands, None, native)
    return output.to(dtype)


def _pass(
    kernel: Kernel,
    codes: Tensor,
    scale: float,
    zero_point: int,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """One product of bytes, in dtype."""
    operands = (scale, zero_point, weight, weight_scale, kernel.weight_zero_point, bias)
    if kernel.geometry is None:
        return torch.ops.onednn.qlinear_pointwise(codes.contiguous(), *operands, *output_as(dtype))
    codes = codes.contiguous(memory_format=torch.channels_last)
    if kernel.rows:
        codes = nn.functional.pad(codes, (0, 0, kernel.rows, kernel.rows), value=zero_point)
    return torch.ops.onednn.qconv_pointwise(codes, *operands, *kernel.geometry, *output_as(dtype))


def _rounds(layer: QuantizedLayer, product: Callable[[torch.dtype], Tensor]) -> bool:
    """Whether a layer's product is not much slower with an output in bfloat16 than with float32.

    oneDNN may want the weight in another order for another output, which is not known when it is
    packed, and then puts it in order at every call: for large weights and small images that takes
    as long as the product. The result has the same bits either way.
    """
    if not writes_bfloat16():
        return False
    if not layer.is_conv or layer.low_memory or math.prod(layer.weight_shape) < WORTH_A_TRIAL:
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        product(dtype)  # makes the kernel
        start = time.perf_counter()
        product(dtype)
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < MUCH_SLOWER * seconds[torch.float32]


def _pads_slowly(layer: QuantizedLayer, width: int, weight: Tensor, scale: Tensor) -> bool:
    """Whether oneDNN computes a padded image of that width much more slowly than one whose rows of
    padding are there already.

    So it does where rows are wide, channels many and the zero-point is not 0: in decoders of large
    images (docs/notebook/2026-11-29-decoder-again.md). weight: in oneDNN's order, of scale [O].
    """
    shape, (_, (high, wide), dilation, _) = layer.weight_shape, geometry(layer)
    if not (high and wide) or layer.low_memory or width * shape[0] < LARGE_ROW:
        return False
    height = max(TRIAL_ROWS, dilation[0] * (shape[2] - 1) + 1)  # none below the kernel's own
    seconds = []
    for rows in (0, high):
        codes = torch.zeros(1, shape[1] * layer.groups, height + 2 * rows, width)
        kernel = Kernel([], torch.zeros(shape[0], dtype=torch.int64), geometry(layer))
        if rows:
            kernel.geometry = _without_rows(geometry(layer))
        codes = codes.to(torch.uint8).contiguous(memory_format=torch.channels_last)
        operands = (kernel, codes, 1.0, 1, weight, scale, None, torch.float32)
        _pass(*operands)  # makes the kernel
        spent = []
        for _ in range(2):
            start = time.perf_counter()
            _pass(*operands)
            spent.append(time.perf_counter() - start)
        seconds.append(min(spent))
    return seconds[0] > PADDING_COSTS * seconds[1]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a int8 [B, M, K], b int8 [B, K, N] -> a b [B, M, N] int32."""
    in_integers = fast_in_integers()
    output = a.new_empty([a.shape[0], a.shape[1], b.shape[2]], dtype=torch.int32)
    for left, right, product in zip(a, b, output, strict=True):
        integer_product(left, right, in_integers=in_integers, out=product)
    return output


def why_not(layer: QuantizedLayer) -> str:
    """Why a layer is simulated instead; empty where integer kernels compute it."""
    if layer.weight_bits == FLOAT_BITS:
        return "its weight is not quantized"
    if layer.activation_bits == FLOAT_BITS:
        return "its input is not quantized"
    if layer.is_conv and isinstance(layer.padding, str):
        return f"padding {layer.padding} is given by name"
    if layer.weight.device.type != "cpu":
        return f"it is on {layer.weight.device.type}, these kernels are for the CPU"
    return ""


def geometry(layer: QuantizedLayer) -> Geometry:
    """stride, padding, dilation, groups."""
    assert not isinstance(layer.padding, str)  # why_not has refused it
    return list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups


def _without_rows(geometry: Geometry) -> Geometry:
    """The same without padding above and below."""
    stride, (_, wide), dilation, groups = geometry
    return stride, [0, wide], dilation, groups


def conv_output_shape(layer: QuantizedLayer, shape: Sequence[int]) -> list[int]:
    """Shape of a convolution's output for an input [N, C, H, W]."""
    stride, padding, dilation, _ = geometry(layer)
    sides = [
        (side + 2 * pad - dilate * (width - 1) - 1) // step + 1
        for side, pad, dilate, width, step in zip(
            shape[2:], padding, dilation, layer.weight_shape[2:], stride, strict=True
        )
    ]
    return [shape[0], layer.weight_shape[0], *sides]


def prepacked(layer: QuantizedLayer, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """weight int8 in the order that oneDNN wants for inputs of x's shape."""
    if not layer.is_conv:
        return torch.ops.onednn.qlinear_prepack(weight, [x.shape[:-1].numel(), x.shape[-1]])
    input_scale, input_zero_point = float(layer.input_scale[0]), int(layer.input_zero_point[0])
    return torch.ops.onednn.qconv_prepack(
        weight, scale, input_scale, input_zero_point, *geometry(layer), list(x.shape)
    )


def _kernel(layer: QuantizedLayer, x: Tensor) -> Kernel:
    """Prepared on first use, for inputs of x's shape (others work too), and kept unless memory is
    dear."""
    kernel: Kernel | None = layer.prepared.get(KERNEL)
    if kernel is None:
        integers = layer.integer_weight(), layer.weight_scale
        parts = weight_parts(*integers, layer.activation_bits)
        inputs = layer.input_scale.tolist(), layer.input_zero_point.tolist()
        weights = [(prepacked(layer, x, part, scale), scale) for part, scale in parts]
        zeros = torch.zeros(len(layer.weight_scale), dtype=torch.int64)
        shape = geometry(layer) if layer.is_conv else None
        kernel = Kernel(weights, zeros, shape, *inputs)
        if shape is not None and _pads_slowly(layer, x.shape[-1], *weights[0]):
            kernel.rows, kernel.geometry = shape[1][0], _without_rows(shape)
        if not layer.low_memory:
            layer.prepared[KERNEL] = kernel
    return kernel


def forget_kernel(layer: QuantizedLayer) -> None:
    """Free the layer's kernel; the next call prepares it again."""
    layer.prepared.pop(KERNEL, None)


# ------------------------------------------------------------------ this machine


def why_unavailable(device: torch.device) -> str:
    """Why integer kernels cannot be used on this machine; empty where they can."""
    if os.environ.get(SWITCH) == "1":
        return f"switched off by {SWITCH}=1"
    if device.type != "cpu":
        return f"its kernels are for the CPU, the model is on {device.type}"
    return why_unusable()
