"""Launches of every kernel for GPUs with every shipped tile, on tensors without content."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qncd_cli.backends.cuda.launch import Call
from qncd_cli.backends.cuda.matmul import matmul_call
from qncd_cli.backends.cuda.norms import GroupNorm, LayerNorm, image_calls, rows_call
from qncd_cli.backends.cuda.product import FloatProduct, Product, float_product_call, product_call
from qncd_cli.backends.cuda.quantize import Quantizer, quantize_call
from qncd_cli.backends.cuda.tiles import FLAT, INT8, PACKED, WIDE, Tile, tiles_of
from qncd_cli.backends.cuda.weights import Weight

CONV3, LINEAR = (3, 3, 1, 1, 1, 1, 1, 1), ()
FORMS = {"3x3 convolution": CONV3, "linear": LINEAR}


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def product_of(
    tile: Tile, packed: bool, geometry: tuple[int, ...], dtype: torch.dtype = torch.float16, **more
) -> Call:
    """A product of LDM-4 (192 channels, 64 x 64 pixels, 8 images) with that tile.

    more: what Product takes, and input_scale_first.
    """
    channels, outputs, taps = 192, 192, 9 if geometry else 1
    shape = (8, 64, 64, channels) if geometry else (8 * 4096, channels)
    weight = _weight(packed, outputs, taps, channels, more.pop("input_scale_first", False))
    range_ = _meta(), _meta(dtype=torch.int32)
    x = _meta(*shape, dtype=torch.int8)
    problem = Product(x, weight, _meta(outputs), *range_, geometry, dtype, **more)
    out = _meta(*problem.output_shape, dtype=problem.output_dtype)
    return product_call(problem, out, tile)


def _weight(packed: bool, outputs: int, taps: int, channels: int, scaled_first: bool) -> Weight:
    codes = _meta(outputs, taps, channels, dtype=torch.int8)
    if packed:
        codes = _meta(outputs, taps, channels // 2, dtype=torch.uint8)
    zero_point = _meta(outputs, dtype=torch.int8) if packed else None
    sums = _meta(taps, outputs, dtype=torch.int32)
    return Weight(codes, zero_point, _meta(outputs), sums, scaled_first)


def float_product_of(
    tile: Tile, packed: bool, geometry: tuple[int, ...], dtype: torch.dtype
) -> Call:
    """The same with an input in floating point."""
    channels, outputs, taps = 192, 192, 9 if geometry else 1
    shape = (8, 64, 64, channels) if geometry else (8 * 4096, channels)
    weight = _weight(packed, outputs, taps, channels, False)
    problem = FloatProduct(_meta(*shape, dtype=dtype), weight, _meta(outputs), geometry, dtype)
    return float_product_call(problem, _meta(*problem.output_shape, dtype=dtype), tile)


def attention_of(width: int, scores: bool) -> Call:
    """A product of attention over 4096 positions with heads of that width."""
    codes = _meta(16, 4096, width, dtype=torch.int8)
    a = codes if scores else _meta(16, 4096, 4096, dtype=torch.int8)
    b = codes.transpose(1, 2) if scores else codes
    return matmul_call(a, b, _meta(16, 4096, b.shape[2], dtype=torch.int32))


def norms_of(bits: int, dtype: torch.dtype = torch.float16) -> Iterator[tuple[str, Call]]:
    """Quantization joined with the norms of LDM-4's images and of DiT-XL's rows."""
    quantizer = smoothing_quantizer(bits)
    for apart in (True, False):
        x = _meta(8, 192, 64, 64, dtype=dtype)
        x = x if apart else x.to(memory_format=torch.channels_last)
        affine = _meta(192, dtype=dtype)
        norm = GroupNorm(affine, affine, 32, 1e-5, True, _meta(8, 192, dtype=dtype))
        codes = _meta(8, 64, 64, 192, dtype=torch.int8)
        statistics = _meta(8, 32), _meta(8, 32)
        for call in image_calls(x, norm, quantizer, statistics, codes, codes):
            yield f"{call.kernel} {bits} bits, channels {'apart' if apart else 'in line'}", call
    for channels in (320, 1152, 2048):
        x = _meta(8, 256, channels, dtype=dtype)
        modulation = _meta(8, channels, dtype=dtype)
        codes = _meta(*x.shape, dtype=torch.int8)
        rows = LayerNorm(1e-6, None, None, modulation, modulation)
        call = rows_call(x, rows, quantizer, codes, codes)
        yield f"{call.kernel} {bits} bits, {channels} channels", call


def quantization_of(image: bool, bits: int, dtype: torch.dtype = torch.float16) -> Call:
    """Quantization of such an image, channels apart, or of its rows; smoothed and shifted."""
    x = _meta(8, 192, 64, 64, dtype=dtype) if image else _meta(8 * 4096, 192, dtype=dtype)
    low = _meta(*((8, 64, 64, 192) if image else x.shape), dtype=torch.int8)
    return quantize_call(x, image, smoothing_quantizer(bits), low, low)


def _named(tile: Tile, packed: bool) -> str:
    return f"{'4-bit' if packed else 'int8'} {tile.rows}x{tile.outputs}x{tile.depth}"


def shipped() -> Iterator[tuple[str, Call]]:
    """Every tile of every kernel, in its forms."""
    for packed, kinds in ((False, (*INT8, FLAT[0])), (True, (*PACKED, FLAT[1]))):
        for tile in kinds:
            for form, geometry in FORMS.items():
                yield f"product {_named(tile, packed)}, {form}", product_of(tile, packed, geometry)
    for packed in (False, True):
        for tile in (*tiles_of(packed, 16), FLAT[packed]):
            for form, geometry in FORMS.items():
                call = float_product_of(tile, packed, geometry, torch.bfloat16)
                yield f"float_product {_named(tile, packed)}, {form}", call
        wide = float_product_of(WIDE, packed, CONV3, torch.float32)
        yield f"float_product {_named(WIDE, packed)}, 3x3 convolution, float32", wide
    for width in (40, 64, 160):
        for scores in (True, False):
            name = f"matmul {'scores' if scores else 'values'}, heads of {width}"
            yield name, attention_of(width, scores)
    for bits in (8, 16):
        for image in (True, False):
            yield (
                f"quantize {bits} bits, {'image' if image else 'rows'}",
                quantization_of(image, bits),
            )
        yield from norms_of(bits)


def smoothing_quantizer(bits: int) -> Quantizer:
    """Of a layer of 192 channels, smoothed and shifted."""
    return Quantizer(_meta(), _meta(dtype=torch.int32), bits, _meta(192), _meta(192))
