"""The kernels as operators of torch, with fakes: torch.compile and graphs can take them.

On CUDA tensors they are compiled, on CPU tensors interpreted. Operators take no classes: what
belongs together (`Quantizer`, `Weight`) comes to them in parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...quant.attention import softmax_codes
from .matmul import matmul
from .norms import GroupNorm, LayerNorm, quantize_image, quantize_rows
from .product import FloatProduct, Product, multiply, multiply_float
from .quantize import Quantizer, quantize
from .weights import Weight

_library = torch.library.Library("qncd", "FRAGMENT")
QUANTIZER = "Tensor? factor, Tensor? shift, Tensor scale, Tensor zero_point, int bits"
_library.define(f"bytes(Tensor x, bool image, {QUANTIZER}) -> (Tensor, Tensor)")
_library.define(
    "image_bytes(Tensor x, Tensor? embedding, Tensor weight, Tensor bias, int groups, float eps, "
    f"bool silu, {QUANTIZER}) -> (Tensor, Tensor)"
)
_library.define(
    "row_bytes(Tensor x, Tensor? weight, Tensor? bias, Tensor? multiplier, Tensor? addend, "
    f"float eps, {QUANTIZER}) -> (Tensor, Tensor)"
)
_library.define(
    "byte_product(Tensor codes, Tensor weight, Tensor? weight_zero_point, Tensor weight_scale, "
    "Tensor weight_sums, Tensor? bias, Tensor scale, Tensor zero_point, int[] geometry, "
    "ScalarType dtype, *, bool high=False, bool input_scale_first=False, Tensor? before=None, "
    "Tensor? residual=None, Tensor? next_factor=None, Tensor? next_shift=None, "
    "Tensor? next_scale=None, Tensor? next_zero_point=None, int next_bits=0) -> Tensor"
)
_library.define(
    "float_product(Tensor x, Tensor weight, Tensor? weight_zero_point, Tensor weight_scale, "
    "Tensor weight_sums, Tensor? bias, int[] geometry, ScalarType dtype, Tensor? before=None) "
    "-> Tensor"
)
_library.define("byte_matmul(Tensor a, Tensor b) -> Tensor")
_library.define(
    "byte_softmax(Tensor sums, Tensor added, Tensor factor, int bits) -> (Tensor, Tensor)"
)


def _quantizer(
    factor: Tensor | None, shift: Tensor | None, scale: Tensor, zero_point: Tensor, bits: int
) -> Quantizer:
    return Quantizer(scale, zero_point, bits, factor, shift)


def _bytes(x: Tensor, image: bool, *quantizer) -> tuple[Tensor, Tensor]:
    return quantize(x, image, _quantizer(*quantizer))


def _bytes_fake(x: Tensor, image: bool, *quantizer) -> tuple[Tensor, Tensor]:
    shape = [x.shape[0], *x.shape[2:], x.shape[1]] if image else [*x.shape]
    return _quantizer(*quantizer).empty_bytes(x, shape)


def _image_bytes(
    x: Tensor,
    embedding: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    *quantizer,
) -> tuple[Tensor, Tensor]:
    norm = GroupNorm(weight, bias, groups, eps, silu, embedding)
    return quantize_image(x, norm, _quantizer(*quantizer))


def _row_bytes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    multiplier: Tensor | None,
    addend: Tensor | None,
    eps: float,
    *quantizer,
) -> tuple[Tensor, Tensor]:
    norm = LayerNorm(eps, weight, bias, multiplier, addend)
    return quantize_rows(x, norm, _quantizer(*quantizer))


def _image_bytes_fake(x: Tensor, *others) -> tuple[Tensor, Tensor]:
    return _bytes_fake(x, True, *others[-5:])


def _row_bytes_fake(x: Tensor, *others) -> tuple[Tensor, Tensor]:
    return _bytes_fake(x, False, *others[-5:])


def _product(
    codes: Tensor,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    geometry: list[int],
    dtype: torch.dtype,
    *,
    high: bool = False,
    input_scale_first: bool = False,
    before: Tensor | None = None,
    residual: Tensor | None = None,
    next_factor: Tensor | None = None,
    next_shift: Tensor | None = None,
    next_scale: Tensor | None = None,
    next_zero_point: Tensor | None = None,
    next_bits: int = 0,
) -> Product:
    following = None
    if next_scale is not None and next_zero_point is not None:
        following = Quantizer(next_scale, next_zero_point, next_bits, next_factor, next_shift)
    parts = Weight(weight, weight_zero_point, weight_scale, weight_sums, input_scale_first)
    residual = None if residual is None else residual.contiguous()
    into = geometry, dtype, high, before, residual, following
    return Product(codes.contiguous(), parts, bias, scale, zero_point, *into)


def _byte_product(*operands, **options) -> Tensor:
    return multiply(_product(*operands, **options))


def _byte_product_fake(*operands, **options) -> Tensor:
    problem = _product(*operands, **options)
    return problem.codes.new_empty(problem.output_shape, dtype=problem.output_dtype)


def _float_problem(
    x: Tensor,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    geometry: list[int],
    dtype: torch.dtype,
    before: Tensor | None = None,
) -> FloatProduct:
    parts = Weight(weight, weight_zero_point, weight_scale, weight_sums, False)
    return FloatProduct(x.contiguous(), parts, bias, geometry, dtype, before)


def _float_product(*operands) -> Tensor:
    return multiply_float(_float_problem(*operands))


def _float_product_fake(*operands) -> Tensor:
    problem = _float_problem(*operands)
    return problem.x.new_empty(problem.output_shape, dtype=problem.dtype)


def _matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty([a.shape[0], a.shape[1], b.shape[2]], dtype=torch.int32)


def _softmax_fake(sums: Tensor, *others) -> tuple[Tensor, Tensor]:
    return torch.empty_like(sums, dtype=torch.int8), sums.new_empty(sums.shape[:-1])


_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "bytes": (_bytes, _bytes_fake),
    "image_bytes": (_image_bytes, _image_bytes_fake),
    "row_bytes": (_row_bytes, _row_bytes_fake),
    "byte_product": (_byte_product, _byte_product_fake),
    "float_product": (_float_product, _float_product_fake),
    "byte_matmul": (matmul, _matmul_fake),
    "byte_softmax": (softmax_codes, _softmax_fake),
}
for name, (function, fake) in _OPERATORS.items():
    for kind in ("CUDA", "CPU"):
        _library.impl(name, function, kind)
    torch.library.register_fake(f"qncd::{name}", fake, lib=_library)
BYTES = torch.ops.qncd.bytes.default
IMAGE_BYTES = torch.ops.qncd.image_bytes.default
ROW_BYTES = torch.ops.qncd.row_bytes.default
BYTE_PRODUCT = torch.ops.qncd.byte_product.default
FLOAT_PRODUCT = torch.ops.qncd.float_product.default
BYTE_MATMUL = torch.ops.qncd.byte_matmul.default
BYTE_SOFTMAX = torch.ops.qncd.byte_softmax.default
