"""Products of bytes as matrices or convolutions."""

import triton
import triton.language as tl

from .addressing import corners, pixel_of, tile_of
from .rounding import code, rounded

NIBBLES: tl.constexpr = tl.constexpr(32)
"""Bytes of packed 4-bit weights that hold the channels of one group: low nibbles the first 32 of
64, high nibbles the others, so that no byte has to be spread over its neighbours."""


@triton.jit
def product(
    x_ptr,
    weight_ptr,
    weight_zero_point_ptr,
    weight_scale_ptr,
    weight_sums_ptr,
    bias_ptr,
    scale_ptr,
    zero_point_ptr,
    before_ptr,
    residual_ptr,
    next_factor_ptr,
    next_shift_ptr,
    next_scale_ptr,
    next_zero_point_ptr,
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
    HIGH_BYTE: tl.constexpr,
    INPUT_SCALE_FIRST: tl.constexpr,
    BIASED: tl.constexpr,
    ADDED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NEXT_BITS: tl.constexpr,
    NEXT_SMOOTHED: tl.constexpr,
    NEXT_SHIFTED: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Codes [N, H, W, C] times a weight [O, taps, padded] -> [N, OH, OW, O], as an implicit product
    of matrices [rows, taps C] x [taps C, O]; a row is a pixel of the output.

    padded: channels of a tap in the weight, a multiple of 64, zeros beyond C. PACKED: two 4-bit
    codes a byte (NIBBLES), with a zero-point per output, else int8. weight_sums [taps, O] int32:
    sums of the weight's integers. POINTWISE: a row's input is the row of that number, as in linear
    layers. HIGH_BYTE: the codes are high bytes. ADDED: to what `before` holds, float32. DTYPE: of
    the layer's output, to which it is rounded before the residual is added. NEXT_BITS: 0, or the
    output is the next layer's codes of so many bits.
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
    sums = tl.full((ROWS, OUTPUTS), 0, tl.int32)
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
        codes = x_ptr + pixel[:, None] * channels + known[None, :]
        a = tl.load(codes, mask=inside[:, None] & (known < channels)[None, :], other=0)
        if PACKED:
            start = tap * tap_bytes + first // 2
            mask = real[None, :] & (first // 2 + depth < tap_bytes)[:, None]
            pairs = tl.load(weights + start, mask=mask, other=0)
            low = (pairs & 15).to(tl.int8) - weight_zero_point
            high = (pairs >> 4).to(tl.int8) - weight_zero_point
            sums = tl.dot(a, low, sums, out_dtype=tl.int32)
            more = (known + NIBBLES < channels)[None, :]
            a = tl.load(codes + NIBBLES, mask=inside[:, None] & more, other=0)
            sums = tl.dot(a, high, sums, out_dtype=tl.int32)
        else:
            mask = real[None, :] & (first + depth < padded)[:, None]
            w = tl.load(weights + tap * tap_bytes + first, mask=mask, other=0)
            sums = tl.dot(a, w, sums, out_dtype=tl.int32)

    zero_point = tl.load(zero_point_ptr)
    scale = tl.load(scale_ptr)
    if HIGH_BYTE:
        zero_point = zero_point >> 8
        scale = scale * 256.0
    else:
        zero_point = zero_point & 255
    for tap in range(0, taps):
        here_sums = tl.load(weight_sums_ptr + tap * outputs + output, mask=real, other=0)
        moved = (here_sums * (128 - zero_point))[None, :]
        if PAD_H == 0 and PAD_W == 0:
            sums += moved
        else:
            _, inside = pixel_of(
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
            sums += tl.where(inside[:, None], moved, 0)

    weight_scale = tl.load(weight_scale_ptr + output, mask=real, other=0.0)[None, :]
    if INPUT_SCALE_FIRST:
        value = (sums.to(tl.float32) * scale) * weight_scale
    else:
        value = sums.to(tl.float32) * (scale * weight_scale)
    if BIASED:
        value = value + tl.load(bias_ptr + output, mask=real, other=0.0)[None, :]
    mask = here[:, None] & real[None, :]
    to = row[:, None].to(tl.int64) * outputs + output[None, :]
    if ADDED:
        value = tl.load(before_ptr + to, mask=mask, other=0.0) + value
    if RESIDUAL:
        residual = tl.load(residual_ptr + to, mask=mask, other=0.0).to(tl.float32)
        value = rounded(value, DTYPE).to(tl.float32) + residual
    if NEXT_BITS:
        value = rounded(value, DTYPE).to(tl.float32)
        if NEXT_SHIFTED:
            value = value - tl.load(next_shift_ptr + output, mask=real, other=0.0)[None, :]
        if NEXT_SMOOTHED:
            factor = tl.load(next_factor_ptr + output, mask=real, other=1.0)[None, :]
            value = tl.div_rn(value, factor)
        next_zero_point = tl.load(next_zero_point_ptr)
        after = code(value, tl.load(next_scale_ptr), next_zero_point, (1 << NEXT_BITS) - 1)
        tl.store(out_ptr + to, (after - 128).to(tl.int8), mask=mask)
    else:
        tl.store(out_ptr + to, rounded(value, DTYPE), mask=mask)
