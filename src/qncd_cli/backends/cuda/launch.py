"""Launches of the kernels, compiled for a GPU or, with TRITON_INTERPRET=1, interpreted on a CPU.

Interpreted kernels are for tests: the same file, the same numbers, some thousand times slower.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .tiles import QUANTIZE_TILES, Tile, choose_tile

EXACT = {"enable_fp_fusion": False}
"""Products are rounded before anything is added to them, as the simulation does it."""
INTERPRETED_UNITS = 1
"""Multiprocessors of the interpreter."""
GEOMETRY = [
    f"{what}_{side}" for what in ("KERNEL", "STRIDE", "PAD", "DILATION") for side in ("H", "W")
]
"""Names of the numbers of a geometry in the kernel."""


@dataclass(frozen=True)
class Next:
    """The layer that reads the output: its range, smoothing and shift; bits: of its codes."""

    scale: Tensor
    zero_point: Tensor
    bits: int
    factor: Tensor | None = None
    shift: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """One launch.

    kernel: its name; grid: programs; operands: in the kernel's order; constants: compiled into it;
    options: of the compiler.
    """

    kernel: str
    grid: tuple[int, ...]
    operands: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


def interpreted() -> bool:
    """Whether Triton is asked to interpret kernels (TRITON_INTERPRET=1)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def kernels(interpreted: bool) -> ModuleType:
    """kernels.py, compiled or interpreted, which Triton decides while it is loaded.

    Two modules of one file: the interpreter writes into the module whose functions it runs.
    """
    from triton import knobs

    name = f"{__package__}.kernels_{'interpreted' if interpreted else 'compiled'}"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("kernels.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with knobs.runtime.scope():
        knobs.runtime.interpret = interpreted
        spec.loader.exec_module(module)
    return module


def _run(call: Call, device: torch.device) -> None:
    """Compiled on a GPU, which is current meanwhile; interpreted on a CPU."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current:
        kernel = getattr(kernels(device.type == "cpu"), call.kernel)
        kernel[call.grid](*call.operands, **call.constants, **call.options)


@functools.cache
def _units(device: torch.device) -> int:
    """Multiprocessors."""
    if device.type != "cuda":
        return INTERPRETED_UNITS
    return torch.cuda.get_device_properties(device).multi_processor_count


# ------------------------------------------------------------------ quantization


def quantize(
    x: Tensor,
    image: bool,
    factor: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Codes less 128 of (x - shift) / factor, int8: low bytes and, above 8 bits, high bytes.

    x: [N, C, H, W] of any float type and order -> [N, H, W, C]; no image: [..., C] -> [..., C].
    factor, shift: [C] or None; scale, zero_point: one number each, on the device.
    """
    if image:
        if x.stride(2) != x.shape[3] * x.stride(3):  # rows that are not in line
            x = x.contiguous(memory_format=torch.channels_last)
        shape = [x.shape[0], *x.shape[2:], x.shape[1]]
    else:
        x, shape = x.contiguous(), list(x.shape)
    low = x.new_empty(shape, dtype=torch.int8)
    high = torch.empty_like(low) if bits > 8 else low.new_empty(0)
    if low.numel():
        call = quantize_call(x, image, factor, shift, scale, zero_point, bits, low, high)
        _run(call, x.device)
    return low, high


def quantize_call(
    x: Tensor,
    image: bool,
    factor: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    low: Tensor,
    high: Tensor,
) -> Call:
    """What `quantize` launches to fill low and high; x's pixels are in line."""
    channels = low.shape[-1]
    pixels = low.numel() // channels
    image_pixels = low.shape[1] * low.shape[2] if image else 1
    strides = (x.stride(0), x.stride(3), x.stride(1)) if image else (channels, 0, 1)
    tile = QUANTIZE_TILES[0] if strides[2] != 1 else QUANTIZE_TILES[1]
    operands = (
        x,
        _or(factor, scale),
        _or(shift, scale),
        scale,
        zero_point,
        low,
        high if bits > 8 else low,
        pixels,
        channels,
        image_pixels,
        *strides,
    )
    constants = {
        "BITS": bits,
        "SMOOTHED": factor is not None,
        "SHIFTED": shift is not None,
        "PIXELS": tile[0],
        "CHANNELS": tile[1],
    }
    grid = (-(-pixels // tile[0]), -(-channels // tile[1]))
    return Call("quantize", grid, operands, constants, dict(EXACT))


def _or(operand: Tensor | None, other: Tensor) -> Tensor:
    """The operand, or where there is none another of its type, which is not read."""
    return other if operand is None else operand


# ------------------------------------------------------------------ products


def output_shape(codes: Sequence[int], outputs: int, geometry: Sequence[int]) -> list[int]:
    """Shape of the product of codes [N, H, W, C] or, without a geometry, [..., C].

    geometry: height and width of the kernel, stride, padding and dilation, each in both
    directions.
    """
    if not geometry:
        return [*codes[:-1], outputs]
    sides = [
        (side + 2 * pad - dilate * (kernel - 1) - 1) // step + 1
        for side, kernel, step, pad, dilate in zip(
            codes[1:3], geometry[:2], geometry[2:4], geometry[4:6], geometry[6:], strict=True
        )
    ]
    return [codes[0], *sides, outputs]


def product(
    codes: Tensor,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    geometry: Sequence[int],
    dtype: torch.dtype,
    *,
    high: bool = False,
    input_scale_first: bool = False,
    before: Tensor | None = None,
    residual: Tensor | None = None,
    following: Next | None = None,
) -> Tensor:
    """Codes less 128, int8 [N, H, W, C] or [..., C], times a weight -> [N, OH, OW, O] or [..., O].

    weight: int8 [O, taps, C'], or two 4-bit codes a byte, uint8 [O, taps, C' / 2], with zero-points
    int8 [O] (weights.py). weight_scale [O], weight_sums [taps, O] int32, bias [O] or None; scale,
    zero_point: of the input, one number each. geometry: as in `output_shape`. high: the codes are
    high bytes. before: float32, the product is added to it; residual: is added to the output in
    dtype; following: the output is that layer's codes, int8.
    """
    codes, outputs = codes.contiguous(), weight.shape[0]
    residual = None if residual is None else residual.contiguous()
    shape = output_shape(codes.shape, outputs, geometry)
    out = codes.new_empty(shape, dtype=torch.int8 if following is not None else dtype)
    rows = out.numel() // outputs
    if rows:
        tile = choose_tile(rows, outputs, weight.dtype == torch.uint8, _units(codes.device))
        operands = codes, weight, weight_zero_point, weight_scale, weight_sums, bias
        extras = high, input_scale_first, before, residual, following
        call = product_call(*operands, scale, zero_point, geometry, dtype, *extras, out, tile)
        _run(call, codes.device)
    return out


def product_call(
    codes: Tensor,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    geometry: Sequence[int],
    dtype: torch.dtype,
    high: bool,
    input_scale_first: bool,
    before: Tensor | None,
    residual: Tensor | None,
    following: Next | None,
    out: Tensor,
    tile: Tile,
) -> Call:
    """What `product` launches to fill out, with that tile."""
    packed = weight.dtype == torch.uint8
    outputs = weight.shape[0]
    rows = out.numel() // outputs
    form = list(geometry) or [1, 1, 1, 1, 0, 0, 1, 1]
    pointwise = form[:6] == [1, 1, 1, 1, 0, 0]
    sides = (1, 1, 1, 1) if pointwise else (*codes.shape[1:3], *out.shape[1:3])
    after = following or Next(scale, zero_point, 0)
    operands = (
        codes,
        weight,
        _or(weight_zero_point, weight_sums),
        weight_scale,
        weight_sums,
        _or(bias, weight_scale),
        scale,
        zero_point,
        _or(before, weight_scale),
        _or(residual, weight_scale),
        _or(after.factor, weight_scale),
        _or(after.shift, weight_scale),
        after.scale,
        after.zero_point,
        out,
        rows,
        outputs,
        codes.shape[-1],
        weight.shape[2] * (2 if packed else 1),
        *sides,
    )
    constants = dict(zip(GEOMETRY, form, strict=True)) | {
        "POINTWISE": pointwise,
        "PACKED": packed,
        "HIGH_BYTE": high,
        "INPUT_SCALE_FIRST": input_scale_first,
        "BIASED": bias is not None,
        "ADDED": before is not None,
        "RESIDUAL": residual is not None,
        "NEXT_BITS": after.bits,
        "NEXT_SMOOTHED": after.factor is not None,
        "NEXT_SHIFTED": after.shift is not None,
        "DTYPE": _triton_type(dtype),
        "ROWS": tile.rows,
        "OUTPUTS": tile.outputs,
        "DEPTH": tile.depth,
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages, **EXACT}
    grid = (tile.count(rows, outputs),)
    return Call("product", grid, operands, constants, options)


def _triton_type(dtype: torch.dtype):
    import triton.language as tl

    kinds = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return kinds[dtype]
