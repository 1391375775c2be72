"""Quantization joined with the norm before it: group norm and SiLU, layer norm and modulation.

What the layers in between would write in 16 bits is rounded to 16 bits here too. The statistics
are float32 sums in another order than torch's, so that a value may fall on the other side of a
code's bound: a code off by one here and there.
"""

import triton
import triton.language as tl

from .rounding import code, rounded

ADDED: tl.constexpr = tl.standard._sum_combine
"""How reductions add: the interpreter knows it, and leaves its own to numpy."""


@triton.jit
def _embedded(x, embedding_ptr, channel, image, channels, real, EMBEDDED: tl.constexpr):
    """x [P, C] of one type plus the embedding of its image, float32, rounded as torch adds it."""
    value = x.to(tl.float32)
    if EMBEDDED:
        at = image * channels + channel
        value = value + tl.load(embedding_ptr + at, mask=real, other=0.0).to(tl.float32)
        value = rounded(value, x.dtype).to(tl.float32)
    return value


@triton.jit
def group_statistics(
    x_ptr,
    embedding_ptr,
    mean_ptr,
    factor_ptr,
    channels,
    image_pixels,
    image_stride,
    pixel_stride,
    channel_stride,
    groups,
    group_channels,
    eps,
    EMBEDDED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of every image's groups, float32 [N, groups].

    x: as in `quantize`; embedding: of x's type [N, channels]. One program per group; CHANNELS: at
    least those of a group.
    """
    image = (tl.program_id(0) // groups).to(tl.int64)
    member = tl.arange(0, CHANNELS)
    channel = tl.program_id(0) % groups * group_channels + member
    real = (member < group_channels)[None, :]
    start = x_ptr + image * image_stride + (channel * channel_stride)[None, :]
    sums = tl.full((PIXELS, CHANNELS), 0.0, tl.float32)
    for first in range(0, image_pixels, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        mask = real & (pixel < image_pixels)[:, None]
        x = tl.load(start + (pixel * pixel_stride)[:, None], mask=mask, other=0.0)
        value = _embedded(x, embedding_ptr, channel[None, :], image, channels, real, EMBEDDED)
        sums += tl.where(mask, value, 0.0)
    count = (image_pixels * group_channels).to(tl.float32)
    mean = tl.div_rn(tl.reduce(tl.reduce(sums, 0, ADDED), 0, ADDED), count)
    sums = tl.full((PIXELS, CHANNELS), 0.0, tl.float32)
    for first in range(0, image_pixels, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        mask = real & (pixel < image_pixels)[:, None]
        x = tl.load(start + (pixel * pixel_stride)[:, None], mask=mask, other=0.0)
        value = _embedded(x, embedding_ptr, channel[None, :], image, channels, real, EMBEDDED)
        sums += tl.where(mask, (value - mean) * (value - mean), 0.0)
    variance = tl.div_rn(tl.reduce(tl.reduce(sums, 0, ADDED), 0, ADDED), count)
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(factor_ptr + tl.program_id(0), tl.div_rn(1.0, tl.sqrt_rn(variance + eps)))


@triton.jit
def normed_image(
    x_ptr,
    embedding_ptr,
    mean_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
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
    groups,
    group_channels,
    EMBEDDED: tl.constexpr,
    SILU: tl.constexpr,
    BITS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SHIFTED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Group norm of x, or of x plus an embedding, then SiLU where asked for -> codes less 128.

    mean, norm: what `group_statistics` wrote; weight, bias [channels] of any float type; the rest
    as in `quantize`.
    """
    pixel = (tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    mask = (pixel < pixels)[:, None] & known[None, :]
    image = pixel // image_pixels
    start = image * image_stride + (pixel % image_pixels) * pixel_stride
    x = tl.load(x_ptr + start[:, None] + (channel * channel_stride)[None, :], mask=mask, other=0.0)
    value = _embedded(x, embedding_ptr, channel[None, :], image[:, None], channels, mask, EMBEDDED)
    group = image[:, None] * groups + (channel // group_channels)[None, :]
    weight = tl.load(weight_ptr + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    gain = tl.load(norm_ptr + group, mask=mask, other=0.0) * weight
    offset = bias - tl.load(mean_ptr + group, mask=mask, other=0.0) * gain
    value = rounded(value * gain + offset, x.dtype).to(tl.float32)
    if SILU:
        value = tl.div_rn(value, 1.0 + tl.exp(-value))
        value = rounded(value, x.dtype).to(tl.float32)
    if SHIFTED:
        value = value - tl.load(shift_ptr + channel, mask=known, other=0.0)[None, :]
    if SMOOTHED:
        value = tl.div_rn(value, tl.load(factor_ptr + channel, mask=known, other=1.0)[None, :])
    codes = code(value, tl.load(scale_ptr), tl.load(zero_point_ptr), (1 << BITS) - 1)
    to = pixel[:, None] * channels + channel[None, :]
    tl.store(low_ptr + to, ((codes & 255) - 128).to(tl.int8), mask=mask)
    if BITS > 8:
        tl.store(high_ptr + to, ((codes >> 8) - 128).to(tl.int8), mask=mask)


@triton.jit
def normed_rows(
    x_ptr,
    weight_ptr,
    bias_ptr,
    multiplier_ptr,
    addend_ptr,
    factor_ptr,
    shift_ptr,
    scale_ptr,
    zero_point_ptr,
    low_ptr,
    high_ptr,
    rows,
    channels,
    image_rows,
    eps,
    AFFINE: tl.constexpr,
    MODULATED: tl.constexpr,
    BITS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Layer norm of the rows x [rows, channels], times multiplier plus addend -> codes less 128.

    AFFINE: weight and bias [channels] are the norm's; MODULATED: multiplier and addend [N,
    channels] of x's type, of the image that image_rows rows belong to. CHANNELS: all of them.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    known = channel < channels
    mask = (row < rows)[:, None] & known[None, :]
    to = row[:, None] * channels + channel[None, :]
    x = tl.load(x_ptr + to, mask=mask, other=0.0)
    value = x.to(tl.float32)
    count = channels.to(tl.float32)
    mean = tl.div_rn(tl.reduce(value, 1, ADDED), count)[:, None]
    value = tl.where(mask, value - mean, 0.0)
    variance = tl.div_rn(tl.reduce(value * value, 1, ADDED), count)
    value = value * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[:, None]
    if AFFINE:
        weight = tl.load(weight_ptr + channel, mask=known, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
        value = value * weight[None, :] + bias[None, :]
    value = rounded(value, x.dtype).to(tl.float32)
    if MODULATED:
        at = (row // image_rows)[:, None] * channels + channel[None, :]
        value = value * tl.load(multiplier_ptr + at, mask=mask, other=0.0).to(tl.float32)
        value = rounded(value, x.dtype).to(tl.float32)
        value = value + tl.load(addend_ptr + at, mask=mask, other=0.0).to(tl.float32)
        value = rounded(value, x.dtype).to(tl.float32)
    if SHIFTED:
        value = value - tl.load(shift_ptr + channel, mask=known, other=0.0)[None, :]
    if SMOOTHED:
        value = tl.div_rn(value, tl.load(factor_ptr + channel, mask=known, other=1.0)[None, :])
    codes = code(value, tl.load(scale_ptr), tl.load(zero_point_ptr), (1 << BITS) - 1)
    tl.store(low_ptr + to, ((codes & 255) - 128).to(tl.int8), mask=mask)
    if BITS > 8:
        tl.store(high_ptr + to, ((codes >> 8) - 128).to(tl.int8), mask=mask)
