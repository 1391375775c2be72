"""The kernels in Triton: quantization to bytes, and products of bytes as matrices or convolutions.

Codes q are kept as q - 128, int8, images in the order [N, H, W, C]. With c = q - 128 and the
zero-point z an output is

    sum_k (q_k - z) w_k = sum_k c_k w_k + (128 - z) sum_k w_k,    k over the taps inside the image

whose first sum reads 0 outside, and whose second comes from the weight's sums per tap. All sums are
int32. float32 operations stand in the order of backends/reference.py and must not be contracted:
whoever launches says enable_fp_fusion=False.

Only builtins of the language are called, not its standard library, which is compiled when triton is
imported and cannot be interpreted afterwards. `launch` loads this file, once to be compiled and
once to be interpreted. Annotations are read by Triton: no `from __future__ import annotations`.
"""

import triton
import triton.language as tl

ROUND_TO_EVEN: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23, as quant/affine.py has it: y + this is y rounded half to even, |y| < 2^22."""
ITS_BITS: tl.constexpr = tl.constexpr(0x4B400000)
NIBBLES: tl.constexpr = tl.constexpr(32)
"""Bytes of packed 4-bit weights that hold the channels of one group: low nibbles the first 32 of
64, high nibbles the others, so that no byte has to be spread over its neighbours."""


@triton.jit
def _code(x, scale, zero_point, largest):
    """x float32 -> code in [0, largest], int32; NaN becomes the zero-point."""
    y = tl.div_rn(x, scale)
    y = tl.where(y == y, y, 0.0)
    low = (-zero_point).to(tl.float32)
    high = (largest - zero_point).to(tl.float32)
    y = tl.minimum(tl.maximum(y, low), high)
    rounded = (y + ROUND_TO_EVEN).to(tl.int32, bitcast=True) - ITS_BITS
    return rounded + zero_point


@triton.jit
def _rounded(value, DTYPE: tl.constexpr):
    """float32 -> DTYPE, rounded half to even; bfloat16 by hand, as the interpreter cuts it off."""
    if tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def quantize(
    x_ptr,
    factor_ptr,
    shift_ptr,
    scale_ptr,
    zero_point_ptr,
    low_ptr,
    high_ptr,
    pixels,
    channels,
    image_pixels,
    image_stride,
    pixel_stride,
    channel_stride,
    BITS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SHIFTED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """(x - shift) / factor -> codes less 128 [pixels, channels]: low bytes, above 8 bits high ones.

    x of any float type: image n, pixel p, channel c at n image_stride + p pixel_stride + c
    channel_stride; factor, shift [channels] float32; scale, zero_point: one number each.
    """
    pixel = (tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    start = (pixel // image_pixels) * image_stride + (pixel % image_pixels) * pixel_stride
    offsets = start[:, None] + (channel * channel_stride)[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if SHIFTED:
        x = x - tl.load(shift_ptr + channel, mask=channel < channels, other=0.0)[None, :]
    if SMOOTHED:
        x = tl.div_rn(x, tl.load(factor_ptr + channel, mask=channel < channels, other=1.0)[None, :])
    code = _code(x, tl.load(scale_ptr), tl.load(zero_point_ptr), (1 << BITS) - 1)
    to = pixel[:, None] * channels + channel[None, :]
    tl.store(low_ptr + to, ((code & 255) - 128).to(tl.int8), mask=mask)
    if BITS > 8:
        tl.store(high_ptr + to, ((code >> 8) - 128).to(tl.int8), mask=mask)


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
    columns = (outputs + OUTPUTS - 1) // OUTPUTS
    tile = tl.program_id(0)
    row = (tile // columns) * ROWS + tl.arange(0, ROWS)
    output = (tile % columns) * OUTPUTS + tl.arange(0, OUTPUTS)
    here, real = row < rows, output < outputs
    depth = tl.arange(0, DEPTH)
    channel = (depth // NIBBLES) * (2 * NIBBLES) + depth % NIBBLES if PACKED else depth
    STEP: tl.constexpr = 2 * DEPTH if PACKED else DEPTH
    tap_bytes = padded // 2 if PACKED else padded
    taps: tl.constexpr = KERNEL_H * KERNEL_W

    if POINTWISE:
        image = row.to(tl.int64)
        top = row * 0
        left = row * 0
    else:
        out_pixels = out_height * out_width
        image = (row // out_pixels).to(tl.int64) * (height * width)
        top = (row % out_pixels) // out_width * STRIDE_H - PAD_H
        left = row % out_width * STRIDE_W - PAD_W

    weights = weight_ptr + output[None, :].to(tl.int64) * (taps * tap_bytes) + depth[:, None]
    if PACKED:
        weight_zero_point = tl.load(weight_zero_point_ptr + output, mask=real, other=0)[None, :]
    blocks = (padded + STEP - 1) // STEP
    sums = tl.full((ROWS, OUTPUTS), 0, tl.int32)
    for k in range(0, taps * blocks):
        tap = k // blocks
        first = (k - tap * blocks) * STEP
        if POINTWISE:
            pixel, inside = image, here
        else:
            y = top + tap // KERNEL_W * DILATION_H
            x = left + tap % KERNEL_W * DILATION_W
            inside = here & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            pixel = image + y * width + x
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
            y = top + tap // KERNEL_W * DILATION_H
            x = left + tap % KERNEL_W * DILATION_W
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
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
        value = _rounded(value, DTYPE).to(tl.float32) + residual
    if NEXT_BITS:
        value = _rounded(value, DTYPE).to(tl.float32)
        if NEXT_SHIFTED:
            value = value - tl.load(next_shift_ptr + output, mask=real, other=0.0)[None, :]
        if NEXT_SMOOTHED:
            factor = tl.load(next_factor_ptr + output, mask=real, other=1.0)[None, :]
            value = tl.div_rn(value, factor)
        next_zero_point = tl.load(next_zero_point_ptr)
        code = _code(value, tl.load(next_scale_ptr), next_zero_point, (1 << NEXT_BITS) - 1)
        tl.store(out_ptr + to, (code - 128).to(tl.int8), mask=mask)
    else:
        tl.store(out_ptr + to, _rounded(value, DTYPE), mask=mask)
