"""Products of bytes in batches, for attention."""

import triton
import triton.language as tl


@triton.jit
def matmul(
    a_ptr,
    b_ptr,
    out_ptr,
    rows,
    columns,
    depth,
    a_batch,
    a_row,
    a_depth,
    b_batch,
    b_depth,
    b_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """a int8 [B, rows, depth] times b int8 [B, depth, columns] -> out int32 [B, rows, columns].

    a_batch to b_column: distances in memory along the operands' axes. One program per batch entry
    (axis 1 of the grid) and tile.
    """
    across = (columns + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    batch = tl.program_id(1).to(tl.int64)
    here, real = (row < rows)[:, None], (column < columns)[None, :]
    left = a_ptr + batch * a_batch + (row.to(tl.int64) * a_row)[:, None]
    right = b_ptr + batch * b_batch + (column.to(tl.int64) * b_column)[None, :]
    sums = tl.full((ROWS, COLUMNS), 0, tl.int32)
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        known = k < depth
        a = tl.load(left + (k * a_depth)[None, :], mask=here & known[None, :], other=0)
        b = tl.load(right + (k * b_depth)[:, None], mask=real & known[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    to = batch * rows * columns + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(out_ptr + to, sums, mask=here & real)
