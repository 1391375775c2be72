"""Products of attention in bytes."""

from __future__ import annotations

import pytest
import torch
from quant.test_attention import exact_matmul, processor, randn

from qncd_cli.backends.cuda.matmul import matmul
from qncd_cli.quant import attention


@pytest.mark.parametrize(("rows", "columns", "width"), [(17, 11, 70), (1, 1, 1), (70, 65, 200)])
def test_it_is_exact_at_the_ends_of_the_codes(rows, columns, width):
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randint(-128, 128, (3, n, width), generator=generator).to(torch.int8)
        for n in (rows, columns)
    )
    a[0], b[0], b[1] = -128, -128, 127
    b = b.transpose(1, 2)
    for right in (b, b.contiguous()):
        assert torch.equal(matmul(a, right), exact_matmul(a, b))
    assert matmul(a[:0], b[:0]).shape == (0, rows, columns)


def test_attention_has_the_bits_that_exact_integers_give(monkeypatch):
    monkeypatch.setattr(attention, "WORTH_INTEGERS", {"macs": 0, "width": 0})
    made, step = processor(8, 8, groups=2)
    query, key, value = (randn(2, 3, n, 16, seed=n) * 2 for n in (7, 9, 9))
    for group in (0, 1):
        step.group = group
        found = []
        for product in (matmul, exact_matmul):
            made.matmul = product
            found.append(made.products(query, key, value, None))
        assert torch.equal(*found)
