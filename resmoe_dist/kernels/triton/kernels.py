"""The Triton kernels: products of tokens with compressed rows, and restoring rows.

Residuals stay encoded. A tile of rows reads its bitmap as 32-bit words. The position of an entry's
value is a prefix sum: the set bits of all words before, plus the set bits below it in its own word.
The values of one word are neighbours in memory, so the lanes of a warp read them together. One
launch runs all jobs: a table of addresses tells each program where its job's tensors are. Sums are
in float32 and in a fixed order, without atomics: equal calls give equal bits.

Legend: N routed copies, S rows, H hidden, D columns, J jobs, K blocks of copies, P spans of rows;
and of a tile: M copies, R rows, W words of bitmap, B = 32 bits of a word, C = 32·W columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BITS = tl.constexpr(32)
# Numbers in a row of the job table; see `backend.job_fields`.
FIELDS = tl.constexpr(13)
# Columns that one program restores: finding where their values begin is then a small share.
RESTORED_COLUMNS = tl.constexpr(1024)
# Words counted, and copies whose products are loaded, at a time.
_COUNTED = tl.constexpr(64)
_LOADED = tl.constexpr(8)
ENTRY_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# Up to this many copies per job are multiplied elementwise: `tl.dot` needs at least 16.
FEW_COPIES = 2
# Registers hold the sums of this many copies beside a tile of weights.
BLOCK_COPIES = 32
# Programs that fill the largest GPUs. With fewer, the rows of a job are cut into spans; each span
# costs one float32 per copy and column.
PROGRAMS = 2048
SPAN_ROWS = 32


@dataclass(frozen=True)
class Plan:
    """Compile-time parameters of a kernel.

    R, W, M: rows, words and copies per step of a program. operand: dtype of what `tl.dot`
    multiplies, None for elementwise products. entry: dtype of centres and values. rounds: some job
    adds the two. plain_center: the centres' rows are contiguous and aligned to 16 bytes.
    whole_words: the bitmaps' rows are multiples of 4 bytes and aligned to 4 bytes.
    """

    R: int
    W: int
    warps: int
    M: int = 1
    operand: tl.dtype | None = None
    entry: tl.dtype = tl.float32
    rounds: bool = False
    plain_center: bool = False
    whole_words: bool = False


# One warp per program: no synchronisation; 32 entries per lane keep enough loads in flight.
FEW = Plan(R=4, W=8, warps=1)
MANY_IN = Plan(R=32, W=4, warps=4)
MANY_OUT = Plan(R=16, W=8, warps=4)


@triton.jit
def _popcount(words):
    """Set bits of uint32 numbers, by halves; LLVM knows the pattern and emits one instruction."""
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    return ((octets * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _load_words(bitmap_R, size, held_R, word_W, end, plan: tl.constexpr):
    """Words [R, W] of bitmap rows of `size` bytes; those from `end` on are zero."""
    held_RW = held_R[:, None] & (word_W < end)[None, :]
    if plan.whole_words:
        pointer_RW = bitmap_R.to(tl.pointer_type(tl.uint32))[:, None] + word_W[None, :]
        words_RW = tl.load(pointer_RW, mask=held_RW & (word_W < size // 4)[None, :], other=0)
    else:
        words_RW = tl.zeros(held_RW.shape, tl.uint32)
        for i in tl.static_range(4):
            byte_W = word_W * 4 + i
            mask_RW = held_RW & (byte_W < size)[None, :]
            byte_RW = tl.load(bitmap_R[:, None] + byte_W[None, :], mask=mask_RW, other=0)
            words_RW |= byte_RW.to(tl.uint32) << (8 * i)
    return words_RW


@triton.jit
def _open_rows(job, row_R, held_R, word, plan: tl.constexpr):
    """Pointers to the rows of a job, for `_weights`, and ahead_R: how far behind the pointer to a
    row's values the first value of bitmap word `word` is.

    job: a row of the job table. held_R: which of the rows exist.
    """
    center = tl.load(job).to(tl.pointer_type(plan.entry))
    row_stride = tl.load(job + 1)
    column_stride = tl.load(job + 2)
    if plan.plain_center:
        center = tl.multiple_of(center, 16)
        row_stride = tl.multiple_of(row_stride, 16)
        column_stride = 1
    has_center = tl.load(job + 3) > 0
    center_R = center + row_R.to(tl.int64) * row_stride
    bitmap = tl.load(job + 4).to(tl.pointer_type(tl.uint8))
    bitmap_R = bitmap + row_R.to(tl.int64) * tl.load(job + 5)
    size = tl.load(job + 6).to(tl.int32)

    # Count from the nearer end of the row: forward from its first value, or back from its last.
    words = (size + 3) // 4
    back = (2 * word >= words).to(tl.int32)
    end = word + (words - word) * back
    counts_RW = tl.zeros([row_R.shape[0], _COUNTED], tl.int32)
    for counted in range(word * back, end, _COUNTED):
        word_W = counted + tl.arange(0, _COUNTED)
        counts_RW += _popcount(_load_words(bitmap_R, size, held_R, word_W, end, plan))
    ahead_R = tl.sum(counts_RW, 1) * (1 - 2 * back)
    # 8-byte offsets are read as two halves (little-endian), 4-byte offsets as a low half.
    wide = tl.load(job + 9)
    mask_R = held_R & (row_R < tl.load(job + 10))
    low_R = tl.load(job + 8).to(tl.pointer_type(tl.uint32)) + (row_R + back) * (1 + wide)
    high_R = tl.load(low_R + wide, mask=mask_R, other=0).to(tl.int64) * wide
    offset_R = (high_R << 32) + tl.load(low_R, mask=mask_R, other=0)
    values_R = tl.load(job + 7).to(tl.pointer_type(plan.entry)) + offset_R
    rows = (held_R, has_center, center_R, column_stride, bitmap_R, size, values_R)
    return rows, ahead_R


@triton.jit
def _columns(word_W, low, high):
    """Column [W, B] of each bit of some words, counted from `low`, and whether in [low, high)."""
    column_WB = word_W[:, None] * BITS + tl.arange(0, BITS)[None, :]
    return column_WB - low, (column_WB >= low) & (column_WB < high)


@triton.jit
def _weights(rows, ahead_R, word_W, low, high, plan: tl.constexpr):
    """Centre + residual [R, W, B] at the columns of some words; float32, zero outside [low, high).

    ahead_R: position of the words' first value. Returns the position after the words, or that of
    the word that holds column `high` if that comes first.
    """
    held_R, has_center, center_R, column_stride, bitmap_R, size, values_R = rows
    column_WB, inside_WB = _columns(word_W, low, high)
    weights_RWB = tl.zeros([ahead_R.shape[0], word_W.shape[0], BITS], tl.float32)
    if has_center:
        center_RWB = center_R[:, None, None] + ((column_WB + low) * column_stride)[None, :, :]
        mask_RWB = held_R[:, None, None] & inside_WB[None, :, :]
        weights_RWB += tl.load(center_RWB, mask=mask_RWB, other=0.0).to(tl.float32)
    if size > 0:
        word_RW = _load_words(bitmap_R, size, held_R, word_W, size, plan)
        counts_RW = _popcount(word_RW)
        first_RW = ahead_R[:, None] + tl.cumsum(counts_RW, 1) - counts_RW
        bit_1B = (tl.full([BITS], 1, tl.uint32) << tl.arange(0, BITS).to(tl.uint32))[None, :]
        lower_RWB = word_RW[:, :, None] & (bit_1B - 1)[None, :, :]
        value_RWB = values_R[:, None, None] + (first_RW[:, :, None] + _popcount(lower_RWB))
        # Columns outside are masked once for all rows, not per entry.
        kept_RWB = (word_RW[:, :, None] & tl.where(inside_WB, bit_1B, 0)[None, :, :]) != 0
        weights_RWB += tl.load(value_RWB, mask=kept_RWB, other=0.0).to(tl.float32)
        ahead_R += tl.sum(tl.where((word_W < high // BITS)[None, :], counts_RW, 0), 1)
    if plan.rounds:
        weights_RWB = weights_RWB.to(plan.entry).to(tl.float32)
    return weights_RWB, ahead_R


@triton.jit(do_not_specialize=["S"])
def restore_kernel(table, out, S, low, high, row_stride, column_stride, plan: tl.constexpr):
    """Program (i, c): rows [R·i, R·(i+1)) at the c-th 1024 of columns [low, high)."""
    row_R = tl.program_id(0) * plan.R + tl.arange(0, plan.R)
    held_R = row_R < S
    out_R = out + row_R.to(tl.int64) * row_stride
    begin = low // BITS + tl.program_id(1) * (RESTORED_COLUMNS // BITS)
    end = tl.minimum(begin + RESTORED_COLUMNS // BITS, tl.cdiv(high, BITS))
    rows, ahead_R = _open_rows(table, row_R, held_R, begin, plan)
    for word in range(begin, end, plan.W):
        word_W = word + tl.arange(0, plan.W)
        weights_RWB, ahead_R = _weights(rows, ahead_R, word_W, low, high, plan)
        column_WB, inside_WB = _columns(word_W, low, high)
        out_RWB = out_R[:, None, None] + (column_WB * column_stride)[None, :, :]
        mask_RWB = held_R[:, None, None] & inside_WB[None, :, :]
        tl.store(out_RWB, weights_RWB.to(out.dtype.element_ty), mask=mask_RWB)


@triton.jit(do_not_specialize=["S"])
def project_in_kernel(table, x, token, out, S, H, inputs: tl.constexpr, plan: tl.constexpr):
    """Program (k, i): the copies of block k times rows [R·i, R·(i+1)) of its job."""
    M: tl.constexpr = plan.M
    R: tl.constexpr = plan.R
    W: tl.constexpr = plan.W
    job = table + tl.program_id(0) * FIELDS
    copies = tl.load(job + 12)
    if copies == 0:
        return
    copy_M = tl.load(job + 11) + tl.arange(0, M)
    held_M = tl.arange(0, M) < copies
    x_M = x + tl.load(token + copy_M, mask=held_M, other=0).to(tl.int64) * H
    row_R = tl.program_id(1) * R + tl.arange(0, R)
    held_R = row_R < S
    rows, ahead_R = _open_rows(job, row_R, held_R, 0, plan)
    for i in range(inputs):
        low = i * H
        high = low + H
        sums = tl.zeros([M, R, W, BITS] if plan.operand is None else [M, R], tl.float32)
        for word in range(low // BITS, tl.cdiv(high, BITS), W):
            word_W = word + tl.arange(0, W)
            weights_RWB, ahead_R = _weights(rows, ahead_R, word_W, low, high, plan)
            column_WB, inside_WB = _columns(word_W, low, high)
            mask_MWB = held_M[:, None, None] & inside_WB[None, :, :]
            x_MWB = tl.load(x_M[:, None, None] + column_WB[None, :, :], mask=mask_MWB, other=0.0)
            if plan.operand is None:
                sums += weights_RWB[None, :, :, :] * x_MWB.to(tl.float32)[:, None, :, :]
            else:
                x_MC = tl.reshape(x_MWB, [M, W * BITS]).to(plan.operand)
                weights_RC = tl.reshape(weights_RWB, [R, W * BITS]).to(plan.operand)
                sums = tl.dot(x_MC, tl.trans(weights_RC), sums, input_precision="ieee")
        sums_MR = tl.sum(tl.sum(sums, 2), 2) if plan.operand is None else sums
        out_MR = out + (copy_M * (inputs * S) + i * S)[:, None] + row_R[None, :]
        tl.store(out_MR, sums_MR, mask=held_M[:, None] & held_R[None, :])


@triton.jit(do_not_specialize=["S", "span_rows"])
def project_out_kernel(
    table, h, products, S, H, span_rows, inputs: tl.constexpr, plan: tl.constexpr
):
    """Program (k, c, p): the copies of block k times the p-th span of rows of its job, at the c-th
    C output columns, into `products` [N, P, H]."""
    M: tl.constexpr = plan.M
    R: tl.constexpr = plan.R
    W: tl.constexpr = plan.W
    job = table + tl.program_id(0) * FIELDS
    copies = tl.load(job + 12)
    if copies == 0:
        return
    copy_M = tl.load(job + 11) + tl.arange(0, M)
    held_M = tl.arange(0, M) < copies
    low = inputs * H
    high = low + H
    word = low // BITS + tl.program_id(1) * W
    word_W = word + tl.arange(0, W)
    begin = tl.program_id(2) * span_rows
    end = tl.minimum(begin + span_rows, S)
    sums = tl.zeros([M, R, W, BITS] if plan.operand is None else [M, W * BITS], tl.float32)
    for row in range(begin, end, R):
        row_R = row + tl.arange(0, R)
        held_R = row_R < end
        rows, ahead_R = _open_rows(job, row_R, held_R, word, plan)
        weights_RWB, _ = _weights(rows, ahead_R, word_W, low, high, plan)
        mask_MR = held_M[:, None] & held_R[None, :]
        h_MR = tl.load(h + copy_M[:, None] * S + row_R[None, :], mask=mask_MR, other=0.0)
        if plan.operand is None:
            sums += weights_RWB[None, :, :, :] * h_MR.to(tl.float32)[:, :, None, None]
        else:
            weights_RC = tl.reshape(weights_RWB, [R, W * BITS]).to(plan.operand)
            sums = tl.dot(h_MR.to(plan.operand), weights_RC, sums, input_precision="ieee")
    sums_MWB = tl.sum(sums, 1) if plan.operand is None else tl.reshape(sums, [M, W, BITS])
    column_WB, inside_WB = _columns(word_W, low, high)
    product_M = products + (copy_M * tl.num_programs(2) + tl.program_id(2)) * H
    mask_MWB = held_M[:, None, None] & inside_WB[None, :, :]
    tl.store(product_M[:, None, None] + column_WB[None, :, :], sums_MWB, mask=mask_MWB)


@triton.jit(do_not_specialize=["N", "P"])
def combine_kernel(
    products, token, out, N, P, H, n: tl.constexpr, p: tl.constexpr, c: tl.constexpr
):
    """Program (t, i): the sum of products [N, P, H] of token t's copies, at the i-th c columns.

    Looks through n copies at a time, and loads p spans of 8 of those that it finds.
    """
    column_C = tl.program_id(1) * c + tl.arange(0, c)
    sums_LPC = tl.zeros([_LOADED, p, c], tl.float32)
    for begin in range(0, N, n):
        copy_N = begin + tl.arange(0, n)
        token_N = tl.load(token + copy_N, mask=copy_N < N, other=-1)
        wanted_N = (token_N == tl.program_id(0)).to(tl.int32)
        rank_N = tl.cumsum(wanted_N, 0) * wanted_N
        for first in range(0, tl.sum(wanted_N), _LOADED):
            rank_L = first + 1 + tl.arange(0, _LOADED)
            found_LN = rank_L[:, None] == rank_N[None, :]
            held_L = tl.sum(found_LN.to(tl.int32), 1) > 0
            copy_L = tl.sum(tl.where(found_LN, copy_N[None, :], 0), 1).to(tl.int64)
            for span in range(0, P, p):
                span_P = span + tl.arange(0, p)
                product_LP = products + (copy_L[:, None] * P + span_P[None, :]) * H
                mask_LP = held_L[:, None] & (span_P < P)[None, :]
                mask_LPC = mask_LP[:, :, None] & (column_C < H)[None, None, :]
                product_LPC = product_LP[:, :, None] + column_C[None, None, :]
                sums_LPC += tl.load(product_LPC, mask=mask_LPC, other=0.0)
    out_C = out + tl.program_id(0).to(tl.int64) * H + column_C
    tl.store(out_C, tl.sum(tl.sum(sums_LPC, 1), 0), mask=column_C < H)
