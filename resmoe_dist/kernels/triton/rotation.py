"""Kernels of the rotation Q of the hidden dimension (see `codecs/rotation.py`).

Q is a Hadamard transform with signs, of every p columns. p = 1: no rotation.

Legend: T tokens, H hidden, p size of a Hadamard matrix; of a tile: R rows, C columns, a multiple of
p, n = R·C/p, X and Y its columns (see `columns.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from resmoe_dist.kernels.triton.columns import BITS, tile_columns
from resmoe_dist.kernels.triton.tiles import load_center, load_streams, open_rows


@triton.jit
def _hadamard(x_np, steps: tl.constexpr):
    """The orthogonal Hadamard transform of the rows of x [n, p], p = 2^steps.

    A step adds and subtracts the pairs whose last index bit differs, and makes that bit the first.
    After all steps the bits are in order again.
    """
    n: tl.constexpr = x_np.shape[0]
    p: tl.constexpr = x_np.shape[1]
    for _ in tl.static_range(steps):
        even, odd = tl.split(tl.reshape(x_np, [n, p // 2, 2]))
        pairs = tl.permute(tl.join(even + odd, even - odd), (0, 2, 1))
        x_np = tl.reshape(pairs, [n, p])
    return x_np * (p**-0.5)


@triton.jit
def rotate_kernel(x, signs, out, H, back: tl.constexpr, steps: tl.constexpr, C: tl.constexpr):
    """Program (t, i): Q x_t into `out` [T, H], or Qᵀ x_t if `back`, at the i-th C columns."""
    column_C = tl.program_id(1) * C + tl.arange(0, C)
    inside_C = column_C < H
    row = tl.program_id(0).to(tl.int64) * H
    x_C = tl.load(x + row + column_C, mask=inside_C, other=0.0).to(tl.float32)
    sign_C = tl.load(signs + column_C, mask=inside_C, other=0.0)
    if not back:
        x_C *= sign_C
    x_C = tl.reshape(_hadamard(tl.reshape(x_C, [C >> steps, 1 << steps]), steps), [C])
    if back:
        x_C *= sign_C
    tl.store(out + row + column_C, x_C.to(out.dtype.element_ty), mask=inside_C)


@triton.jit
def _in_order(tile_RXY, plan: tl.constexpr):
    """A tile of streams [R, X, Y] as [R, C], the columns in order."""
    return tl.reshape(tl.permute(tile_RXY, (0, 2, 1)), [plan.R, plan.X * plan.Y])


@triton.jit(do_not_specialize=["job", "first_row", "S", "first", "end"])
def restore_quantized_kernel(
    table,
    job,
    signs,
    out,
    first_row,
    S,
    H,
    first,
    end,
    row_stride,
    column_stride,
    steps: tl.constexpr,
    plan: tl.constexpr,
):
    """Program (i, c, b): rows [R·i, R·(i+1)) of S, counted from `first_row`, at the c-th C columns
    of projection b. Stores columns [first, end) of the job's row."""
    R: tl.constexpr = plan.R
    C: tl.constexpr = plan.X * plan.Y
    low = tl.program_id(2) * H
    begin = tl.program_id(1) * C
    if (low + begin >= end) | (low + begin + C <= first):
        return
    word = begin // BITS
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    held_R = row_R < S
    rows, _ = open_rows(table + job * plan.fields, first_row + row_R, held_R, word, plan)
    weights_RC = _in_order(load_streams(rows, word, low, plan), plan)
    column_C = begin + tl.arange(0, C)
    if steps > 0:
        weights_np = tl.reshape(weights_RC, [R * C >> steps, 1 << steps])
        weights_RC = tl.reshape(_hadamard(weights_np, steps), [R, C])
        weights_RC *= tl.load(signs + column_C, mask=column_C < H, other=0.0)[None, :]
    if plan.has_centers:
        column_XY, inside_XY = tile_columns(word, low, low + H, plan)
        weights_RC += _in_order(load_center(rows, low, column_XY, inside_XY), plan)
    at_C = low + column_C
    out_RC = (out + row_R.to(tl.int64) * row_stride)[:, None]
    out_RC += ((at_C - first).to(tl.int64) * column_stride)[None, :]
    wanted_C = (column_C < H) & (at_C >= first) & (at_C < end)
    mask_RC = held_R[:, None] & wanted_C[None, :]
    tl.store(out_RC, weights_RC.to(out.dtype.element_ty), mask=mask_RC)
