"""Launches of products with weights of bytes, as matrices or convolutions: of bytes, of floats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import EXACT, Call, operand_or, run, triton_type, units
from .quantize import Quantizer
from .tiles import Tile, candidates, choose_tile
from .tuning import can_time, milliseconds, table_of
from .weights import Weight

GEOMETRY = [
    f"{what}_{side}" for what in ("KERNEL", "STRIDE", "PAD", "DILATION") for side in ("H", "W")
]
"""Names of the numbers of a geometry in the kernel."""


@dataclass(frozen=True)
class Product:
    """Codes less 128 times a weight, and what becomes of the sums.

    codes: int8 [N, H, W, C] or, without a geometry, [..., C]; bias: [O] or None; scale, zero_point:
    of the input, one number each; geometry: height and width of the kernel, stride, padding and
    dilation, each in both directions; dtype: of the output. high: the codes are high bytes.
    before: float32, the product is added to it; residual: is added to the output in dtype;
    following: of the next layer, whose codes are the output then, int8.
    """

    codes: Tensor
    weight: Weight
    bias: Tensor | None
    scale: Tensor
    zero_point: Tensor
    geometry: Sequence[int]
    dtype: torch.dtype
    high: bool = False
    before: Tensor | None = None
    residual: Tensor | None = None
    following: Quantizer | None = None

    @property
    def outputs(self) -> int:
        return self.weight.codes.shape[0]

    @property
    def output_shape(self) -> list[int]:
        """[N, OH, OW, O] or [..., O]"""
        return output_shape(self.codes.shape, self.outputs, self.geometry)

    @property
    def output_dtype(self) -> torch.dtype:
        return self.dtype if self.following is None else torch.int8


def output_shape(codes: Sequence[int], outputs: int, geometry: Sequence[int]) -> list[int]:
    """Shape of the product of codes [N, H, W, C] or, without a geometry, [..., C]."""
    if not geometry:
        return [*codes[:-1], outputs]
    sides = [
        (side + 2 * pad - dilate * (kernel - 1) - 1) // step + 1
        for side, kernel, step, pad, dilate in zip(
            codes[1:3], geometry[:2], geometry[2:4], geometry[4:6], geometry[6:], strict=True
        )
    ]
    return [codes[0], *sides, outputs]


def multiply(problem: Product) -> Tensor:
    """The product -> [N, OH, OW, O] or [..., O]; codes and residual are in line in memory."""
    out = problem.codes.new_empty(problem.output_shape, dtype=problem.output_dtype)
    rows = out.numel() // problem.outputs
    if rows:
        device = problem.codes.device
        run(product_call(problem, out, _tile(problem, out, rows)), device)
    return out


def _tile(problem: Product, out: Tensor, rows: int) -> Tile:
    """The tile that is fastest, where launches can be timed; else the one that arithmetic says."""
    device, weight = problem.codes.device, problem.weight
    if not can_time(device):
        return choose_tile(rows, problem.outputs, weight.packed, units(device))
    _, _, channels, *_ = _sizes(problem.codes, weight, problem.geometry, out)
    after = "codes" if problem.following is not None else str(problem.dtype)
    words = "packed" if weight.packed else "int8", *problem.geometry, after
    shape = " ".join(map(str, (rows, problem.outputs, channels, *words)))
    return table_of(device).fastest(
        shape,
        candidates(rows, weight.packed),
        lambda tile: milliseconds(product_call(problem, out, tile), device),
    )


def product_call(problem: Product, out: Tensor, tile: Tile) -> Call:
    """What `multiply` launches to fill out, with that tile."""
    weight, rows = problem.weight, out.numel() // problem.outputs
    after = problem.following or Quantizer(problem.scale, problem.zero_point, 0)
    operands = (
        problem.codes,
        weight.codes,
        operand_or(weight.zero_point, weight.sums),
        weight.scale,
        weight.sums,
        operand_or(problem.bias, weight.scale),
        problem.scale,
        problem.zero_point,
        operand_or(problem.before, weight.scale),
        operand_or(problem.residual, weight.scale),
        *after.operands,
        out,
        *_sizes(problem.codes, weight, problem.geometry, out),
    )
    constants = _form(problem.geometry) | {
        "PACKED": weight.packed,
        "HIGH_BYTE": problem.high,
        "INPUT_SCALE_FIRST": weight.input_scale_first,
        "BIASED": problem.bias is not None,
        "ADDED": problem.before is not None,
        "RESIDUAL": problem.residual is not None,
        **{f"NEXT_{name}": value for name, value in after.constants.items()},
        "DTYPE": triton_type(problem.dtype),
    }
    grid = (tile.count(rows, problem.outputs),)
    return Call("product", grid, operands, constants | tile.constants, tile.options | EXACT)


def _sizes(x: Tensor, weight: Weight, geometry: Sequence[int], out: Tensor) -> tuple[int, ...]:
    """Rows, outputs, channels, channels of a tap in the weight, sides of the input and output."""
    outputs = weight.codes.shape[0]
    sides = (1, 1, 1, 1) if _pointwise(geometry) else (*x.shape[1:3], *out.shape[1:3])
    padded = weight.codes.shape[2] * (2 if weight.packed else 1)
    return out.numel() // outputs, outputs, x.shape[-1], padded, *sides


def _pointwise(geometry: Sequence[int]) -> bool:
    return list(geometry[:6]) in ([], [1, 1, 1, 1, 0, 0])


def _form(geometry: Sequence[int]) -> dict[str, int | bool]:
    """The numbers of a geometry by their names in the kernels."""
    form = list(geometry) or [1, 1, 1, 1, 0, 0, 1, 1]
    return dict(zip(GEOMETRY, form, strict=True)) | {"POINTWISE": _pointwise(geometry)}


# ------------------------------------------------------------------ inputs in floating point


@dataclass(frozen=True)
class FloatProduct:
    """Numbers in floating point times a weight of bytes.

    x: float32, float16 or bfloat16 [N, H, W, C] or [..., C], in line in memory; before: float32,
    the product is added to it; the rest as of `Product`.
    """

    x: Tensor
    weight: Weight
    bias: Tensor | None
    geometry: Sequence[int]
    dtype: torch.dtype
    before: Tensor | None = None

    @property
    def output_shape(self) -> list[int]:
        """[N, OH, OW, O] or [..., O]"""
        return output_shape(self.x.shape, self.weight.codes.shape[0], self.geometry)


def multiply_float(problem: FloatProduct) -> Tensor:
    """The product -> [N, OH, OW, O] or [..., O]"""
    x, weight = problem.x, problem.weight
    out = x.new_empty(problem.output_shape, dtype=problem.dtype)
    outputs = weight.codes.shape[0]
    rows = out.numel() // outputs
    if rows:
        bits = 8 * x.element_size()
        tile = choose_tile(rows, outputs, weight.packed, units(x.device), bits)
        run(float_product_call(problem, out, tile), x.device)
    return out


def float_product_call(problem: FloatProduct, out: Tensor, tile: Tile) -> Call:
    """What `multiply_float` launches to fill out, with that tile."""
    weight = problem.weight
    operands = (
        problem.x,
        weight.codes,
        operand_or(weight.zero_point, weight.sums),
        weight.scale,
        operand_or(problem.bias, weight.scale),
        operand_or(problem.before, weight.scale),
        out,
        *_sizes(problem.x, weight, problem.geometry, out),
    )
    constants = _form(problem.geometry) | {
        "PACKED": weight.packed,
        "BIASED": problem.bias is not None,
        "ADDED": problem.before is not None,
        "WIDENED": problem.x.dtype == torch.bfloat16 and problem.x.device.type == "cpu",
        "DTYPE": triton_type(problem.dtype),
    }
    grid = (tile.count(out.numel() // weight.codes.shape[0], weight.codes.shape[0]),)
    return Call("float_product", grid, operands, constants | tile.constants, tile.options | EXACT)
