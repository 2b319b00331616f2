"""Kernels of the rotation Q of the hidden dimension (see `codecs/rotation.py`).

Q is a Hadamard transform with signs, of every p columns. p = 1: no rotation.

Legend: T tokens, H hidden, p size of a Hadamard matrix; of a tile: R rows, C columns, a multiple of
p; n = R·C/p, W words of B = 32 columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from resmoe_dist.kernels.triton.streams import load_entries
from resmoe_dist.kernels.triton.tiles import load_center, open_rows
from resmoe_dist.kernels.triton.words import BITS, word_columns


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
def rotate_kernel(
    x, signs, out, H, back: tl.constexpr, steps: tl.constexpr, C: tl.constexpr
):
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
    W: tl.constexpr = plan.W
    word = tl.program_id(1) * W
    low = tl.program_id(2) * H
    begin = low + word * BITS
    if (begin >= end) | (begin + W * BITS <= first):
        return
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    held_R = row_R < S
    word_W = word + tl.arange(0, W)
    column_WB, inside_WB = word_columns(word_W, low, low + H, plan)
    mask_RWB = held_R[:, None, None] & inside_WB[None, :, :]
    rows, _ = open_rows(table + job * plan.fields, first_row + row_R, held_R, word, plan)
    weights_RWB = load_entries(rows[2], word_W, low) + load_entries(rows[3], word_W, low)
    if steps > 0:
        weights_np = tl.reshape(weights_RWB, [R * W * BITS >> steps, 1 << steps])
        weights_RWB = tl.reshape(_hadamard(weights_np, steps), [R, W, BITS])
        weights_RWB *= tl.load(signs + column_WB, mask=inside_WB, other=0.0)[None, :, :]
    weights_RWB += load_center(rows[1], low, column_WB, mask_RWB)
    at_WB = low + column_WB
    out_RWB = (out + row_R.to(tl.int64) * row_stride)[:, None, None]
    out_RWB += ((at_WB - first).to(tl.int64) * column_stride)[None, :, :]
    mask_RWB &= ((at_WB >= first) & (at_WB < end))[None, :, :]
    tl.store(out_RWB, weights_RWB.to(out.dtype.element_ty), mask=mask_RWB)
