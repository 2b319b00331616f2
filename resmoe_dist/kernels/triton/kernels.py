"""The Triton kernels: products of tokens with compressed rows, and restoring rows.

One launch runs all jobs: a table of addresses tells each program where its job's tensors are, and
the offsets of the jobs' copies, read on the device, tell which copies it multiplies. Sums are in
float32 and in a fixed order, without atomics: equal calls give equal bits.

Legend: N routed copies, S rows, H hidden, J jobs, P spans of rows, Q copies loaded together; of a
tile: M copies, R rows, W words, X and Y its columns (see `columns.py`), C = X·Y columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resmoe_dist.kernels.triton.columns import BITS, tile_columns, word_range
from resmoe_dist.kernels.triton.tiles import load_weights, open_rows

# Columns that one program restores: finding where their values begin is then a small share.
RESTORED_COLUMNS = tl.constexpr(1024)
# Copies whose products are loaded at a time.
_LOADED = tl.constexpr(8)


@triton.jit
def _copies_of_block(offsets, J, plan: tl.constexpr):
    """Job, first copy and number of copies of block `program_id(0)`.

    A job's blocks have M copies each, the last one the rest. The first block of job j is number
    ⌊(offsets[j] + j·(M - 1)) / M⌋, which leaves enough numbers for the jobs before it and needs no
    sum over them. Numbers that no job uses are blocks without copies (0 or fewer).
    """
    M: tl.constexpr = plan.M
    block = tl.program_id(0)
    job_J = tl.arange(0, plan.J)
    first_J = (tl.load(offsets + job_J, mask=job_J < J, other=0) + job_J * (M - 1)) // M
    job = tl.sum(((first_J <= block) & (job_J < J)).to(tl.int32)) - 1
    begin = tl.load(offsets + job)
    first = begin + (block - (begin + job * (M - 1)) // M) * M
    copies = tl.minimum(tl.load(offsets + job + 1) - first, M)
    return job, first.to(tl.int32), copies.to(tl.int32)


@triton.jit(do_not_specialize=["job", "first_row", "S"])
def restore_kernel(
    table, job, out, first_row, S, low, high, row_stride, column_stride, plan: tl.constexpr
):
    """Program (i, c): rows [R·i, R·(i+1)) of S, counted from `first_row`, at the c-th 1024 of
    columns [low, high). For residuals of codec `pruned`."""
    row_R = tl.program_id(0) * plan.R + tl.arange(0, plan.R)
    held_R = row_R < S
    out_R = out + row_R.to(tl.int64) * row_stride
    begin = low // BITS + tl.program_id(1) * (RESTORED_COLUMNS // BITS)
    end = tl.minimum(begin + RESTORED_COLUMNS // BITS, tl.cdiv(high, BITS))
    rows, ahead_R = open_rows(table + job * plan.fields, first_row + row_R, held_R, begin, plan)
    for word in range(begin, end, plan.W):
        weights_RXY, ahead_R = load_weights(rows, ahead_R, word, low, high, plan)
        column_XY, inside_XY = tile_columns(word, low, high, plan)
        out_RXY = out_R[:, None, None] + (column_XY * column_stride)[None, :, :]
        mask_RXY = held_R[:, None, None] & inside_XY[None, :, :]
        tl.store(out_RXY, weights_RXY.to(out.dtype.element_ty), mask=mask_RXY)


@triton.jit(do_not_specialize=["J", "first_row", "S"])
def project_in_kernel(
    table, offsets, J, x, token, out, first_row, S, H, inputs: tl.constexpr, plan: tl.constexpr
):
    """Program (k, i): the copies of block k times rows [R·i, R·(i+1)) of its job's S, counted from
    `first_row`, into `out` [N, inputs·S]."""
    M: tl.constexpr = plan.M
    R: tl.constexpr = plan.R
    Y: tl.constexpr = plan.Y
    C: tl.constexpr = plan.X * plan.Y
    job, first, copies = _copies_of_block(offsets, J, plan)
    if copies <= 0:
        return
    copy_M = first + tl.arange(0, M)
    held_M = tl.arange(0, M) < copies
    x_M = x + tl.load(token + copy_M, mask=held_M, other=0).to(tl.int64) * H
    row_R = tl.program_id(1) * R + tl.arange(0, R)
    held_R = row_R < S
    rows, ahead_R = open_rows(table + job * plan.fields, first_row + row_R, held_R, 0, plan)
    for i in range(inputs):
        low = i * H
        high = low + H
        sums = tl.zeros([M, R, Y] if plan.operand is None else [M, R], tl.float32)
        begin, end = word_range(low, high, plan)
        for word in range(begin, end, plan.W):
            weights_RXY, ahead_R = load_weights(rows, ahead_R, word, low, high, plan)
            column_XY, inside_XY = tile_columns(word, low, high, plan)
            mask_MXY = held_M[:, None, None] & inside_XY[None, :, :]
            x_MXY = tl.load(x_M[:, None, None] + column_XY[None, :, :], mask=mask_MXY, other=0.0)
            if plan.operand is None:
                x_M1XY = x_MXY.to(tl.float32)[:, None, :, :]
                sums += tl.sum(weights_RXY[None, :, :, :] * x_M1XY, 2)
            else:
                x_MC = tl.reshape(x_MXY, [M, C]).to(plan.operand)
                weights_RC = tl.reshape(weights_RXY, [R, C]).to(plan.operand)
                sums = tl.dot(x_MC, tl.trans(weights_RC), sums, input_precision="ieee")
        sums_MR = tl.sum(sums, 2) if plan.operand is None else sums
        out_MR = out + (copy_M.to(tl.int64) * (inputs * S) + i * S)[:, None] + row_R[None, :]
        tl.store(out_MR, sums_MR, mask=held_M[:, None] & held_R[None, :])


@triton.jit(do_not_specialize=["J", "first_row", "S", "span_rows"])
def project_out_kernel(
    table,
    offsets,
    J,
    h,
    products,
    first_row,
    S,
    H,
    span_rows,
    inputs: tl.constexpr,
    plan: tl.constexpr,
):
    """Program (k, c, p): the copies of block k times the p-th span of its job's S rows, counted
    from `first_row`, at the c-th C output columns, into `products` [N, P, H]."""
    M: tl.constexpr = plan.M
    R: tl.constexpr = plan.R
    X: tl.constexpr = plan.X
    Y: tl.constexpr = plan.Y
    job, first, copies = _copies_of_block(offsets, J, plan)
    copy_M = first + tl.arange(0, M)
    held_M = tl.arange(0, M) < copies
    low = inputs * H
    high = low + H
    word = word_range(low, high, plan)[0] + tl.program_id(1) * plan.W
    begin = tl.program_id(2) * span_rows
    # No rows for a block without copies: it stores nothing.
    end = tl.minimum(begin + span_rows, tl.where(copies > 0, S, 0))
    sums = tl.zeros([M, X, Y] if plan.operand is None else [M, X * Y], tl.float32)
    for row in range(begin, end, R):
        row_R = row + tl.arange(0, R)
        held_R = row_R < end
        rows, ahead_R = open_rows(table + job * plan.fields, first_row + row_R, held_R, word, plan)
        weights_RXY, _ = load_weights(rows, ahead_R, word, low, high, plan)
        mask_MR = held_M[:, None] & held_R[None, :]
        h_MR = tl.load(
            h + copy_M.to(tl.int64)[:, None] * S + row_R[None, :], mask=mask_MR, other=0.0
        )
        if plan.operand is None:
            h_MR11 = h_MR.to(tl.float32)[:, :, None, None]
            sums += tl.sum(weights_RXY[None, :, :, :] * h_MR11, 1)
        else:
            weights_RC = tl.reshape(weights_RXY, [R, X * Y]).to(plan.operand)
            sums = tl.dot(h_MR.to(plan.operand), weights_RC, sums, input_precision="ieee")
    sums_MXY = tl.reshape(sums, [M, X, Y])
    column_XY, inside_XY = tile_columns(word, low, high, plan)
    product_M = products + (copy_M.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)) * H
    mask_MXY = held_M[:, None, None] & inside_XY[None, :, :]
    tl.store(product_M[:, None, None] + column_XY[None, :, :], sums_MXY, mask=mask_MXY)


@triton.jit(do_not_specialize=["J", "P"])
def combine_kernel(
    products,
    token,
    offsets,
    J,
    out,
    P,
    H,
    n: tl.constexpr,
    p: tl.constexpr,
    c: tl.constexpr,
):
    """Program (t, i): the sum of products [N, P, H] of token t's copies, at the i-th c columns.

    Copies after the last offset are left out. The program looks through n copies at a time, and
    loads p spans of 8 of those that it finds.
    """
    N = tl.load(offsets + J).to(tl.int32)
    column_C = tl.program_id(1) * c + tl.arange(0, c)
    sums_QPC = tl.zeros([_LOADED, p, c], tl.float32)
    for begin in range(0, N, n):
        copy_N = begin + tl.arange(0, n)
        token_N = tl.load(token + copy_N, mask=copy_N < N, other=-1)
        wanted_N = (token_N == tl.program_id(0)).to(tl.int32)
        rank_N = tl.cumsum(wanted_N, 0) * wanted_N
        for first in range(0, tl.sum(wanted_N), _LOADED):
            rank_Q = first + 1 + tl.arange(0, _LOADED)
            found_QN = rank_Q[:, None] == rank_N[None, :]
            held_Q = tl.sum(found_QN.to(tl.int32), 1) > 0
            copy_Q = tl.sum(tl.where(found_QN, copy_N[None, :], 0), 1).to(tl.int64)
            for span in range(0, P, p):
                span_P = span + tl.arange(0, p)
                product_QP = products + (copy_Q[:, None] * P + span_P[None, :]) * H
                mask_QP = held_Q[:, None] & (span_P < P)[None, :]
                mask_QPC = mask_QP[:, :, None] & (column_C < H)[None, None, :]
                product_QPC = product_QP[:, :, None] + column_C[None, None, :]
                sums_QPC += tl.load(product_QPC, mask=mask_QPC, other=0.0)
    out_C = out + tl.program_id(0).to(tl.int64) * H + column_C
    tl.store(out_C, tl.sum(tl.sum(sums_QPC, 1), 0), mask=column_C < H)
