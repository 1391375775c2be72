"""Products of numbers in floating point with weights of bytes, as matrices or convolutions."""

import triton
import triton.language as tl

from .addressing import corners, pixel_of, tile_of
from .product import NIBBLES
from .rounding import rounded


@triton.jit
def float_product(
    x_ptr,
    weight_ptr,
    weight_zero_point_ptr,
    weight_scale_ptr,
    bias_ptr,
    before_ptr,
    out_ptr,
    rows,
    outputs,
    channels,
    padded,
    height,
    width,
    out_height,
    out_width,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    POINTWISE: tl.constexpr,
    PACKED: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    WIDENED: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x [N, H, W, C] of float16, bfloat16 or float32 times a weight as in `product`, whose integers
    every one of these types has exactly: products are exact, sums float32, and scaled at the end.

    ADDED: to what `before` holds, float32. WIDENED: for the interpreter, whose dot takes bfloat16
    for integers; the products are the same.
    """
    row, output = tile_of(outputs, ROWS, OUTPUTS)
    here, real = row < rows, output < outputs
    depth = tl.arange(0, DEPTH)
    channel = (depth // NIBBLES) * (2 * NIBBLES) + depth % NIBBLES if PACKED else depth
    STEP: tl.constexpr = 2 * DEPTH if PACKED else DEPTH
    tap_bytes = padded // 2 if PACKED else padded
    taps: tl.constexpr = KERNEL_H * KERNEL_W

    image, top, left = corners(
        row,
        height,
        width,
        out_height,
        out_width,
        STRIDE_H,
        STRIDE_W,
        PAD_H,
        PAD_W,
        POINTWISE,
    )

    weights = weight_ptr + output[None, :].to(tl.int64) * (taps * tap_bytes) + depth[:, None]
    if PACKED:
        weight_zero_point = tl.load(weight_zero_point_ptr + output, mask=real, other=0)[None, :]
    blocks = (padded + STEP - 1) // STEP
    sums = tl.full((ROWS, OUTPUTS), 0.0, tl.float32)
    for k in range(0, taps * blocks):
        tap = k // blocks
        first = (k - tap * blocks) * STEP
        pixel, inside = pixel_of(
            tap,
            here,
            image,
            top,
            left,
            height,
            width,
            KERNEL_W,
            DILATION_H,
            DILATION_W,
            POINTWISE,
        )
        known = first + channel
        numbers = x_ptr + pixel[:, None] * channels + known[None, :]
        a = tl.load(numbers, mask=inside[:, None] & (known < channels)[None, :], other=0.0)
        a = a.to(tl.float32) if WIDENED else a
        if PACKED:
            start = tap * tap_bytes + first // 2
            mask = real[None, :] & (first // 2 + depth < tap_bytes)[:, None]
            pairs = tl.load(weights + start, mask=mask, other=0)
            low = ((pairs & 15).to(tl.int8) - weight_zero_point).to(a.dtype)
            high = ((pairs >> 4).to(tl.int8) - weight_zero_point).to(a.dtype)
            sums = tl.dot(a, low, sums, input_precision="ieee")
            more = (known + NIBBLES < channels)[None, :]
            a = tl.load(numbers + NIBBLES, mask=inside[:, None] & more, other=0.0)
            a = a.to(tl.float32) if WIDENED else a
            sums = tl.dot(a, high, sums, input_precision="ieee")
        else:
            mask = real[None, :] & (first + depth < padded)[:, None]
            w = tl.load(weights + tap * tap_bytes + first, mask=mask, other=0).to(a.dtype)
            sums = tl.dot(a, w, sums, input_precision="ieee")

    value = sums * tl.load(weight_scale_ptr + output, mask=real, other=0.0)[None, :]
    if BIASED:
        value = value + tl.load(bias_ptr + output, mask=real, other=0.0)[None, :]
    mask = here[:, None] & real[None, :]
    to = row[:, None].to(tl.int64) * outputs + output[None, :]
    if ADDED:
        value = tl.load(before_ptr + to, mask=mask, other=0.0) + value
    tl.store(out_ptr + to, rounded(value, DTYPE), mask=mask)
