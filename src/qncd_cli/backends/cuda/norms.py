"""Launches that quantize what a norm makes of the input of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import EXACT, Call, operand_or, run
from .quantize import Quantizer, with_pixels_in_line
from .tiles import QUANTIZE_TILES, STATISTICS_PIXELS, widest_rows


@dataclass(frozen=True)
class GroupNorm:
    """Group norm of an image, or of an image plus an embedding [N, C] of its type, then SiLU where
    asked for; weight, bias: [C] of any float type."""

    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    silu: bool
    embedding: Tensor | None = None


@dataclass(frozen=True)
class LayerNorm:
    """Layer norm of rows, times multiplier plus addend ([N, C] of their type) where these are;
    weight, bias: [C] of any float type, or None."""

    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    multiplier: Tensor | None = None
    addend: Tensor | None = None


def quantize_image(x: Tensor, norm: GroupNorm, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """x [N, C, H, W] of any float type and order -> codes less 128 of its norm, int8 [N, H, W, C]:
    low bytes and, above 8 bits, high bytes."""
    x = with_pixels_in_line(x)
    low, high = quantizer.empty_bytes(x, [x.shape[0], *x.shape[2:], x.shape[1]])
    if low.numel():
        mean = x.new_empty([x.shape[0], norm.groups], dtype=torch.float32)
        statistics = mean, torch.empty_like(mean)
        for call in image_calls(x, norm, quantizer, statistics, low, high):
            run(call, x.device)
    return low, high


def image_calls(
    x: Tensor,
    norm: GroupNorm,
    quantizer: Quantizer,
    statistics: tuple[Tensor, Tensor],
    low: Tensor,
    high: Tensor,
) -> Sequence[Call]:
    """What `quantize_image` launches: statistics [N, groups] float32, then codes."""
    images, channels, *sides = x.shape
    image_pixels, members = sides[0] * sides[1], channels // norm.groups
    strides = x.stride(0), x.stride(3), x.stride(1)
    embedding = x if norm.embedding is None else norm.embedding.contiguous()
    embedded = {"EMBEDDED": norm.embedding is not None}
    first = Call(
        "group_statistics",
        (images * norm.groups,),
        (*(x, embedding, *statistics, channels, image_pixels, *strides), norm.groups, members)
        + (norm.eps,),
        embedded | {"PIXELS": STATISTICS_PIXELS, "CHANNELS": power_of_two(members)},
        dict(EXACT),
    )
    pixels, tile = images * image_pixels, QUANTIZE_TILES[0 if strides[2] != 1 else 1]
    codes = Call(
        "normed_image",
        (-(-pixels // tile[0]), -(-channels // tile[1])),
        (
            *(x, embedding, *statistics, norm.weight, norm.bias, *quantizer.operands),
            *(low, high if quantizer.bits > 8 else low),
            *(pixels, channels, image_pixels, *strides, norm.groups, members),
        ),
        embedded
        | {"SILU": norm.silu, "PIXELS": tile[0], "CHANNELS": tile[1]}
        | quantizer.constants,
        dict(EXACT),
    )
    return first, codes


def quantize_rows(x: Tensor, norm: LayerNorm, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """x [N, L, C] of any float type -> codes less 128 of its norm, int8: low bytes and, above 8
    bits, high bytes."""
    x = x.contiguous()
    low, high = quantizer.empty_bytes(x, list(x.shape))
    if low.numel():
        run(rows_call(x, norm, quantizer, low, high), x.device)
    return low, high


def rows_call(x: Tensor, norm: LayerNorm, quantizer: Quantizer, low: Tensor, high: Tensor) -> Call:
    """What `quantize_rows` launches to fill low and high."""
    channels = x.shape[-1]
    rows, width = x.numel() // channels, power_of_two(channels)
    tile = widest_rows(width)
    modulation = (
        part if part is None else part.contiguous() for part in (norm.multiplier, norm.addend)
    )
    operands = (
        x,
        operand_or(norm.weight, x),
        operand_or(norm.bias, x),
        *(operand_or(part, x) for part in modulation),
        *quantizer.operands,
        low,
        high if quantizer.bits > 8 else low,
        *(rows, channels, x.shape[-2], norm.eps),
    )
    constants = quantizer.constants | {
        "AFFINE": norm.weight is not None,
        "MODULATED": norm.multiplier is not None,
        "ROWS": tile,
        "CHANNELS": width,
    }
    return Call("normed_rows", (-(-rows // tile),), operands, constants, dict(EXACT))


def power_of_two(size: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (size - 1).bit_length()
