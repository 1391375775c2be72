"""Products of bytes have the same sums whatever they are multiplied as."""

from __future__ import annotations

import pytest
import torch

from qncd_cli.quant.integer_products import integer_product
from qncd_cli.sampling.noise import generator_for


@pytest.mark.parametrize("shape", [(3, 5, 2), (700, 1500, 9), (40, 1024, 40), (1, 2049, 1)])
def test_products_of_bytes_are_the_same_in_integers_and_in_floats(shape):
    rows, inner, columns = shape
    draw = generator_for(3)
    a = torch.randint(-128, 128, (rows, inner), generator=draw, dtype=torch.int8)
    b = torch.randint(-128, 128, (inner, columns), generator=draw, dtype=torch.int8)
    a[0], b[:, 0] = -128, -128  # the largest sum: exact in float32 for 1,024 products and no more
    found = [integer_product(a, b, in_integers=in_integers) for in_integers in (True, False)]
    assert int(found[0][0, 0]) == inner * 2**14
    assert torch.equal(*found)
    given = torch.empty_like(found[0])
    assert integer_product(a, b, in_integers=False, out=given) is given
    assert torch.equal(given, found[0])
