"""The kernels as operators of torch, with fakes: torch.compile and graphs can take them.

On CUDA tensors they are compiled, on CPU tensors interpreted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import launch
from .launch import Next

_library = torch.library.Library("qncd", "FRAGMENT")
_library.define(
    "bytes(Tensor x, bool image, Tensor? factor, Tensor? shift, Tensor scale, Tensor zero_point, "
    "int bits) -> (Tensor, Tensor)"
)
_library.define(
    "byte_product(Tensor codes, Tensor weight, Tensor? weight_zero_point, Tensor weight_scale, "
    "Tensor weight_sums, Tensor? bias, Tensor scale, Tensor zero_point, int[] geometry, "
    "ScalarType dtype, *, bool high=False, bool input_scale_first=False, Tensor? before=None, "
    "Tensor? residual=None, Tensor? next_scale=None, Tensor? next_zero_point=None, "
    "int next_bits=0, Tensor? next_factor=None, Tensor? next_shift=None) -> Tensor"
)


def _byte_product(
    *operands: Any,
    next_scale: Tensor | None = None,
    next_zero_point: Tensor | None = None,
    next_bits: int = 0,
    next_factor: Tensor | None = None,
    next_shift: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """launch.product, whose `following` comes in parts: operators take no classes."""
    following = None
    if next_scale is not None and next_zero_point is not None:
        following = Next(next_scale, next_zero_point, next_bits, next_factor, next_shift)
    return launch.product(*operands, **options, following=following)


def _bytes_fake(x: Tensor, image: bool, *quantizer: Any) -> tuple[Tensor, Tensor]:
    shape = [x.shape[0], *x.shape[2:], x.shape[1]] if image else x.shape
    low = x.new_empty(shape, dtype=torch.int8)
    return low, torch.empty_like(low) if quantizer[-1] > 8 else low.new_empty(0)


def _byte_product_fake(codes: Tensor, weight: Tensor, *others: Any, **options: Any) -> Tensor:
    geometry, dtype = others[6:8]
    dtype = torch.int8 if options.get("next_bits") else dtype
    shape = launch.output_shape(codes.shape, weight.shape[0], geometry)
    return codes.new_empty(shape, dtype=dtype)


for kind in ("CUDA", "CPU"):
    _library.impl("bytes", launch.quantize, kind)
    _library.impl("byte_product", _byte_product, kind)
torch.library.register_fake("qncd::bytes", _bytes_fake, lib=_library)
torch.library.register_fake("qncd::byte_product", _byte_product_fake, lib=_library)
BYTES = torch.ops.qncd.bytes.default
BYTE_PRODUCT = torch.ops.qncd.byte_product.default
