"""Launches of products of bytes in batches, for attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Call, run
from .tiles import ATTENTION


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a int8 [B, M, K], b int8 [B, K, N], in any order in memory -> a b [B, M, N] int32."""
    out = a.new_empty([a.shape[0], a.shape[1], b.shape[2]], dtype=torch.int32)
    if out.numel():
        run(matmul_call(a, b, out), a.device)
    return out


def matmul_call(a: Tensor, b: Tensor, out: Tensor) -> Call:
    """What `matmul` launches to fill out."""
    batch, rows, columns = out.shape
    operands = (a, b, out, rows, columns, a.shape[2], *a.stride(), *b.stride())
    tile = ATTENTION
    constants = {"ROWS": tile.rows, "COLUMNS": tile.outputs, "DEPTH": tile.depth}
    return Call("matmul", (tile.count(rows, columns), batch), operands, constants, tile.options)
