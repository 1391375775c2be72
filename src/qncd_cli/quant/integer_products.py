"""Matrix products of signed bytes, the same integers on every CPU."""

from __future__ import annotations

import torch
from torch import Tensor

SUMMED_IN_FLOATS = 1 << 10
"""Products of signed bytes that are added up in float32, which has every integer up to
2^10 * 128^2 = 2^24."""


def fast_in_integers() -> bool:
    """Whether torch multiplies bytes faster than floating-point numbers on this CPU.

    Without AVX512-VNNI it takes them one by one, up to eighty times as slow as float32.
    """
    return torch.cpu._is_vnni_supported()


def integer_product(
    a: Tensor, b: Tensor, *, in_integers: bool, out: Tensor | None = None
) -> Tensor:
    """a int8 [M, K], b int8 [K, N] -> a b [M, N] int32, which every sum has to fit.

    in_integers: whether bytes are multiplied as such or in float32, a part of K at a time whose
    sums are exact. Both give the same. out: where the product is written.
    """
    if out is None:
        out = torch.empty(a.shape[0], b.shape[1], dtype=torch.int32)
    if in_integers:
        return torch._int_mm(a, b, out=out)
    parts = zip(a.split(SUMMED_IN_FLOATS, 1), b.split(SUMMED_IN_FLOATS), strict=True)
    for number, (columns, rows) in enumerate(parts):
        product = columns.float() @ rows.float()
        out.add_(product.to(torch.int32)) if number else out.copy_(product)
    return out
