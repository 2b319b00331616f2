"""The GPU path of the operations that `resmoe_dist.kernels.reference` defines, in Triton.

Residuals stay encoded. A tile of rows reads its bitmap as 32-bit words; the set bits of the words
before (a running sum) and of the lower bits of an entry's own word tell where its value lies. The
values of a word are neighbours in memory, so the lanes of a warp read them together. All jobs of a
call go through one launch: a table of addresses tells each program where its job lies. Sums are in
float32 and in a fixed order, without atomics: equal calls give equal bits.

Legend: T tokens, N copies (a token sent to an expert), S rows, H hidden, D columns, J jobs, K
blocks of copies, P spans of rows; and of a tile: M copies, R rows, W words of bitmap, B = 32 bits
of a word, C = 32·W columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from resmoe_dist.kernels.rows import CompressedRows

_BITS = tl.constexpr(32)
# Numbers in a row of `_table`.
_FIELDS = tl.constexpr(13)
# Columns that one program restores: enough to make little of finding where their values begin.
_RESTORED = tl.constexpr(1024)
# Words that are counted, and copies whose products are loaded, at a time.
_COUNTED = tl.constexpr(64)
_LOADED = tl.constexpr(8)
_ENTRIES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# Up to so many copies a job are multiplied elementwise: `tl.dot` takes no fewer than 16.
_FEW_COPIES = 2
# With more copies in a block, the registers would not hold both their sums and a tile.
_BLOCK_COPIES = 32
# So many programs fill the largest GPUs. Where there are fewer, the rows of a job are cut into
# spans, each of which costs a float32 per copy and column.
_PROGRAMS = 2048
_SPAN_ROWS = 32


@dataclass(frozen=True)
class _Plan:
    """What is compiled into a kernel.

    R, W, M: rows, words and copies a program takes at a time. operand: dtype of what `tl.dot`
    multiplies, None for elementwise products. entry: dtype of centres and values. rounds: some job
    adds the two. plain_center: the centres' rows are dense and begin at multiples of 16 bytes.
    whole_words: the bitmaps' rows are, and begin at, multiples of 4 bytes.
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


# In a program of one warp none waits for another, and 32 entries a lane keep the memory busy.
_FEW = _Plan(R=4, W=8, warps=1)
_MANY_IN = _Plan(R=32, W=4, warps=4)
_MANY_OUT = _Plan(R=16, W=8, warps=4)


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
    """Where rows of a job lie, for `_weights`; and how far from the pointer to values given there
    the first value of word `word` of the bitmap is.

    job: a row of `_table`. held_R: which of the rows exist.
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

    # Counted from the nearer end of the row: from its first value on, or back from past its last.
    words = (size + 3) // 4
    back = (2 * word >= words).to(tl.int32)
    end = word + (words - word) * back
    counts_RW = tl.zeros([row_R.shape[0], _COUNTED], tl.int32)
    for counted in range(word * back, end, _COUNTED):
        word_W = counted + tl.arange(0, _COUNTED)
        counts_RW += _popcount(_load_words(bitmap_R, size, held_R, word_W, end, plan))
    ahead_R = tl.sum(counts_RW, 1) * (1 - 2 * back)
    # Offsets of 8 bytes are read in halves (little-endian), those of 4 bytes as a lower half.
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
    column_WB = word_W[:, None] * _BITS + tl.arange(0, _BITS)[None, :]
    return column_WB - low, (column_WB >= low) & (column_WB < high)


@triton.jit
def _weights(rows, ahead_R, word_W, low, high, plan: tl.constexpr):
    """Centre + residual [R, W, B] at the columns of some words; float32, zero outside [low, high).

    ahead_R: how far the first value of the words is; returned for what comes after the words, or
    for the word that holds column `high` where that is nearer.
    """
    held_R, has_center, center_R, column_stride, bitmap_R, size, values_R = rows
    column_WB, inside_WB = _columns(word_W, low, high)
    weights_RWB = tl.zeros([ahead_R.shape[0], word_W.shape[0], _BITS], tl.float32)
    if has_center:
        center_RWB = center_R[:, None, None] + ((column_WB + low) * column_stride)[None, :, :]
        mask_RWB = held_R[:, None, None] & inside_WB[None, :, :]
        weights_RWB += tl.load(center_RWB, mask=mask_RWB, other=0.0).to(tl.float32)
    if size > 0:
        word_RW = _load_words(bitmap_R, size, held_R, word_W, size, plan)
        counts_RW = _popcount(word_RW)
        first_RW = ahead_R[:, None] + tl.cumsum(counts_RW, 1) - counts_RW
        bit_1B = (tl.full([_BITS], 1, tl.uint32) << tl.arange(0, _BITS).to(tl.uint32))[None, :]
        lower_RWB = word_RW[:, :, None] & (bit_1B - 1)[None, :, :]
        value_RWB = values_R[:, None, None] + (first_RW[:, :, None] + _popcount(lower_RWB))
        # What is outside is masked here, once for all rows, and not at each entry.
        kept_RWB = (word_RW[:, :, None] & tl.where(inside_WB, bit_1B, 0)[None, :, :]) != 0
        weights_RWB += tl.load(value_RWB, mask=kept_RWB, other=0.0).to(tl.float32)
        ahead_R += tl.sum(tl.where((word_W < high // _BITS)[None, :], counts_RW, 0), 1)
    if plan.rounds:
        weights_RWB = weights_RWB.to(plan.entry).to(tl.float32)
    return weights_RWB, ahead_R


@triton.jit(do_not_specialize=["S"])
def _restore_kernel(table, out, S, low, high, row_stride, column_stride, plan: tl.constexpr):
    """Program (i, c): rows [R·i, R·(i+1)) at the c-th 1024 of columns [low, high)."""
    row_R = tl.program_id(0) * plan.R + tl.arange(0, plan.R)
    held_R = row_R < S
    out_R = out + row_R.to(tl.int64) * row_stride
    begin = low // _BITS + tl.program_id(1) * (_RESTORED // _BITS)
    end = tl.minimum(begin + _RESTORED // _BITS, tl.cdiv(high, _BITS))
    rows, ahead_R = _open_rows(table, row_R, held_R, begin, plan)
    for word in range(begin, end, plan.W):
        word_W = word + tl.arange(0, plan.W)
        weights_RWB, ahead_R = _weights(rows, ahead_R, word_W, low, high, plan)
        column_WB, inside_WB = _columns(word_W, low, high)
        out_RWB = out_R[:, None, None] + (column_WB * column_stride)[None, :, :]
        mask_RWB = held_R[:, None, None] & inside_WB[None, :, :]
        tl.store(out_RWB, weights_RWB.to(out.dtype.element_ty), mask=mask_RWB)


@triton.jit(do_not_specialize=["S"])
def _project_in_kernel(table, x, token, out, S, H, inputs: tl.constexpr, plan: tl.constexpr):
    """Program (k, i): the copies of block k times rows [R·i, R·(i+1)) of its job."""
    M: tl.constexpr = plan.M
    R: tl.constexpr = plan.R
    W: tl.constexpr = plan.W
    job = table + tl.program_id(0) * _FIELDS
    copy_M = tl.load(job + 11) + tl.arange(0, M)
    held_M = tl.arange(0, M) < tl.load(job + 12)
    x_M = x + tl.load(token + copy_M, mask=held_M, other=0).to(tl.int64) * H
    row_R = tl.program_id(1) * R + tl.arange(0, R)
    held_R = row_R < S
    rows, ahead_R = _open_rows(job, row_R, held_R, 0, plan)
    for i in range(inputs):
        low = i * H
        high = low + H
        sums = tl.zeros([M, R, W, _BITS] if plan.operand is None else [M, R], tl.float32)
        for word in range(low // _BITS, tl.cdiv(high, _BITS), W):
            word_W = word + tl.arange(0, W)
            weights_RWB, ahead_R = _weights(rows, ahead_R, word_W, low, high, plan)
            column_WB, inside_WB = _columns(word_W, low, high)
            mask_MWB = held_M[:, None, None] & inside_WB[None, :, :]
            x_MWB = tl.load(x_M[:, None, None] + column_WB[None, :, :], mask=mask_MWB, other=0.0)
            if plan.operand is None:
                sums += weights_RWB[None, :, :, :] * x_MWB.to(tl.float32)[:, None, :, :]
            else:
                x_MC = tl.reshape(x_MWB, [M, W * _BITS]).to(plan.operand)
                weights_RC = tl.reshape(weights_RWB, [R, W * _BITS]).to(plan.operand)
                sums = tl.dot(x_MC, tl.trans(weights_RC), sums, input_precision="ieee")
        sums_MR = tl.sum(tl.sum(sums, 2), 2) if plan.operand is None else sums
        out_MR = out + (copy_M * (inputs * S) + i * S)[:, None] + row_R[None, :]
        tl.store(out_MR, sums_MR, mask=held_M[:, None] & held_R[None, :])


@triton.jit(do_not_specialize=["S", "span_rows"])
def _project_out_kernel(
    table, h, products, S, H, span_rows, inputs: tl.constexpr, plan: tl.constexpr
):
    """Program (k, c, p): the copies of block k times the p-th span of rows of its job, at the c-th
    C output columns, into `products` [N, P, H]."""
    M: tl.constexpr = plan.M
    R: tl.constexpr = plan.R
    W: tl.constexpr = plan.W
    job = table + tl.program_id(0) * _FIELDS
    copy_M = tl.load(job + 11) + tl.arange(0, M)
    held_M = tl.arange(0, M) < tl.load(job + 12)
    low = inputs * H
    high = low + H
    word = low // _BITS + tl.program_id(1) * W
    word_W = word + tl.arange(0, W)
    begin = tl.program_id(2) * span_rows
    end = tl.minimum(begin + span_rows, S)
    sums = tl.zeros([M, R, W, _BITS] if plan.operand is None else [M, W * _BITS], tl.float32)
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
            weights_RC = tl.reshape(weights_RWB, [R, W * _BITS]).to(plan.operand)
            sums = tl.dot(h_MR.to(plan.operand), weights_RC, sums, input_precision="ieee")
    sums_MWB = tl.sum(sums, 1) if plan.operand is None else tl.reshape(sums, [M, W, _BITS])
    column_WB, inside_WB = _columns(word_W, low, high)
    product_M = products + (copy_M * tl.num_programs(2) + tl.program_id(2)) * H
    mask_MWB = held_M[:, None, None] & inside_WB[None, :, :]
    tl.store(product_M[:, None, None] + column_WB[None, :, :], sums_MWB, mask=mask_MWB)


@triton.jit(do_not_specialize=["N", "P"])
def _combine_kernel(
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


def restore(rows: CompressedRows, out_SC: Tensor, first_column: int = 0) -> None:
    """`reference.restore`: one program per few rows and 1024 columns."""
    S, columns = out_SC.shape
    if not out_SC.numel():
        return
    plan = _plan(_FEW, [1], out_SC.dtype, [rows])
    table = _table([rows], [1], plan.M, out_SC.device)
    column_blocks = triton.cdiv(first_column % _BITS.value + columns, _RESTORED.value)
    out = (out_SC, S, first_column, first_column + columns, *out_SC.stride())
    with torch.cuda.device_of(out_SC):
        _restore_kernel[triton.cdiv(S, plan.R), column_blocks](table, *out, **_compiled(plan))


def project_in(
    x_TH: Tensor, token_N: Tensor, counts_J: list[int], jobs: list[CompressedRows], inputs: int
) -> Tensor:
    """`reference.project_in`: one program per block of copies of a job and few rows.

    Tokens and entries of different dtypes meet in float32: exact, but without tensor cores.
    """
    S, H = jobs[0].count if jobs else 0, x_TH.shape[1]
    out_NC = torch.empty(len(token_N), inputs * S, dtype=torch.float32, device=x_TH.device)
    if not out_NC.numel():
        return out_NC
    plan = _plan(_MANY_IN, counts_J, x_TH.dtype, jobs)
    table = _table(jobs, counts_J, plan.M, x_TH.device)
    x = (x_TH.contiguous(), token_N.contiguous())
    with torch.cuda.device_of(x_TH):
        _project_in_kernel[len(table), triton.cdiv(S, plan.R)](
            table, *x, out_NC, S, H, inputs, **_compiled(plan)
        )
    return out_NC


def project_out(
    h_NS: Tensor,
    token_N: Tensor,
    counts_J: list[int],
    jobs: list[CompressedRows],
    inputs: int,
    num_tokens: int,
    hidden: int,
) -> Tensor:
    """`reference.project_out`: one program per block of copies of a job, few columns and span of
    rows; then one per token and columns adds up what the former wrote.

    Activations and entries of different dtypes meet in float32, as in `project_in`.
    """
    out_TH = torch.zeros(num_tokens, hidden, dtype=torch.float32, device=h_NS.device)
    N, S = sum(counts_J), h_NS.shape[1]
    if not (N and S and out_TH.numel()):
        return out_TH
    plan = _plan(_MANY_OUT, counts_J, h_NS.dtype, jobs)
    table = _table(jobs, counts_J, plan.M, h_NS.device)
    column_blocks = triton.cdiv(inputs * hidden % _BITS.value + hidden, plan.W * _BITS.value)
    spans = min(triton.cdiv(S, _SPAN_ROWS), triton.cdiv(_PROGRAMS, len(table) * column_blocks))
    span_rows = triton.cdiv(S, spans * plan.R) * plan.R
    P = triton.cdiv(S, span_rows)
    products_NPH = torch.empty(N, P, hidden, dtype=torch.float32, device=h_NS.device)
    h = (h_NS.contiguous(), products_NPH, S, hidden, span_rows, inputs)
    n = triton.next_power_of_2(max(16, min(N, 1024)))
    p = triton.next_power_of_2(min(P, 16))
    # The 8·p·c products that are loaded together fit the registers.
    c = min(1024 // p, 512)
    with torch.cuda.device_of(h_NS):
        _project_out_kernel[len(table), column_blocks, P](table, *h, **_compiled(plan))
        _combine_kernel[num_tokens, triton.cdiv(hidden, c)](
            products_NPH, token_N.contiguous(), out_TH, N, P, hidden, n, p, c, enable_fp_fusion=True
        )
    return out_TH


def _plan(
    many: _Plan, counts_J: list[int], dtype: torch.dtype, jobs: list[CompressedRows]
) -> _Plan:
    """For copies of this dtype; as `many` says if a job has more than a few."""
    centers = [rows.center for rows in jobs if rows.center is not None]
    residuals = [rows for rows in jobs if rows.bitmap is not None]
    dtypes = {tensor.dtype for tensor in (*centers, *(rows.values for rows in residuals))}
    assert len(dtypes) == 1, f"the jobs' entries are of {dtypes}"
    plan, M, operand = _FEW, triton.next_power_of_2(max(1, *counts_J)), None
    if M > _FEW_COPIES:
        plan, M = many, min(max(M, 16), _BLOCK_COPIES)
        # Triton's interpreter would multiply the bits of bfloat16 as integers.
        compiled = isinstance(_project_in_kernel, triton.JITFunction)
        operand = _ENTRIES[dtype] if compiled and dtypes == {dtype} else tl.float32
    return replace(
        plan,
        M=M,
        operand=operand,
        entry=_ENTRIES[dtypes.pop()],
        rounds=any(rows.center is not None for rows in residuals),
        plain_center=all(
            center.stride(1) == 1
            and center.data_ptr() % 16 == 0
            and center.stride(0) * center.itemsize % 16 == 0
            for center in centers
        ),
        whole_words=all(
            number % 4 == 0
            for bitmap in (rows.bitmap for rows in residuals)
            for number in (bitmap.data_ptr(), bitmap.stride(0), bitmap.shape[1])
        ),
    )


def _compiled(plan: _Plan) -> dict[str, object]:
    """How to compile for a plan; Triton fuses products and sums by itself in some releases only."""
    return {"plan": plan, "num_warps": plan.warps, "enable_fp_fusion": True}


def _table(jobs: list[CompressedRows], counts_J: list[int], M: int, device: torch.device) -> Tensor:
    """[K, _FIELDS] int64, a row per block of at most M copies of one job:

    of the job's centre 0 address, 1 row stride, 2 column stride, 3 rows; of its bitmap 4 address,
    5 row stride, 6 bytes in a row; 7 address of its values; of its row offsets 8 address, 9 whether
    int64, 10 rows; of the block 11 first copy, 12 copies. What a job lacks is zeros.
    """
    table = []
    end = 0
    for rows, count in zip(jobs, counts_J, strict=True):
        begin, end = end, end + count
        center, bitmap, values, offsets = rows.center, rows.bitmap, rows.values, rows.row_offsets
        fields = [0] * 11
        if center is not None:
            fields[:4] = center.data_ptr(), *center.stride(), len(center)
        if bitmap is not None:
            assert bitmap.stride(1) == 1 and values.is_contiguous() and offsets.is_contiguous()
            fields[4:8] = bitmap.data_ptr(), bitmap.stride(0), bitmap.shape[1], values.data_ptr()
            fields[8:] = offsets.data_ptr(), offsets.dtype == torch.int64, len(bitmap)
        table += [[*fields, first, min(M, end - first)] for first in range(begin, end, M)]
    # From pinned memory the copy does not wait for what the device still has to do.
    pinned = torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)
