"""Quantization to bytes."""

import triton
import triton.language as tl

from .rounding import code


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
    codes = code(x, tl.load(scale_ptr), tl.load(zero_point_ptr), (1 << BITS) - 1)
    to = pixel[:, None] * channels + channel[None, :]
    tl.store(low_ptr + to, ((codes & 255) - 128).to(tl.int8), mask=mask)
    if BITS > 8:
        tl.store(high_ptr + to, ((codes >> 8) - 128).to(tl.int8), mask=mask)
