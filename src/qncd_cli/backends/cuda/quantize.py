"""Launches that quantize the input of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import EXACT, Call, operand_or, run
from .tiles import QUANTIZE_TILES


@dataclass(frozen=True)
class Quantizer:
    """What a layer makes of its input: codes of (x - shift) / factor.

    scale, zero_point: one number each, on the device; bits: of the codes; factor, shift: [C].
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    factor: Tensor | None = None
    shift: Tensor | None = None

    def empty_bytes(self, x: Tensor, shape: list[int]) -> tuple[Tensor, Tensor]:
        """Room for codes of that shape on x's device: low bytes and, above 8 bits, high bytes."""
        low = x.new_empty(shape, dtype=torch.int8)
        return low, torch.empty_like(low) if self.bits > 8 else low.new_empty(0)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """factor, shift, scale and zero-point as kernels take them."""
        factor, shift = (operand_or(x, self.scale) for x in (self.factor, self.shift))
        return factor, shift, self.scale, self.zero_point

    @property
    def constants(self) -> dict[str, int | bool]:
        """Which of the operands a kernel reads."""
        smoothed, shifted = self.factor is not None, self.shift is not None
        return {"BITS": self.bits, "SMOOTHED": smoothed, "SHIFTED": shifted}


def quantize(x: Tensor, image: bool, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Codes less 128, int8: low bytes and, above 8 bits, high bytes.

    x: [N, C, H, W] of any float type and order -> [N, H, W, C]; no image: [..., C] -> [..., C].
    """
    if image:
        x = with_pixels_in_line(x)
        shape = [x.shape[0], *x.shape[2:], x.shape[1]]
    else:
        x, shape = x.contiguous(), list(x.shape)
    low, high = quantizer.empty_bytes(x, shape)
    if low.numel():
        run(quantize_call(x, image, quantizer, low, high), x.device)
    return low, high


def with_pixels_in_line(x: Tensor) -> Tensor:
    """An image [N, C, H, W] whose rows follow each other in memory at one distance."""
    if x.stride(2) != x.shape[3] * x.stride(3):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def quantize_call(x: Tensor, image: bool, quantizer: Quantizer, low: Tensor, high: Tensor) -> Call:
    """What `quantize` launches to fill low and high; x's pixels are in line."""
    channels = low.shape[-1]
    pixels = low.numel() // channels
    image_pixels = low.shape[1] * low.shape[2] if image else 1
    strides = (x.stride(0), x.stride(3), x.stride(1)) if image else (channels, 0, 1)
    tile = QUANTIZE_TILES[0] if strides[2] != 1 else QUANTIZE_TILES[1]
    operands = (
        x,
        *quantizer.operands,
        low,
        high if quantizer.bits > 8 else low,
        pixels,
        channels,
        image_pixels,
        *strides,
    )
    constants = quantizer.constants | {"PIXELS": tile[0], "CHANNELS": tile[1]}
    grid = (-(-pixels // tile[0]), -(-channels // tile[1]))
    return Call("quantize", grid, operands, constants, dict(EXACT))
