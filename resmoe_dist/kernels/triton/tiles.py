"""Tiles of weights: a job's rows, read as centre plus decoded residual.

Residuals stay encoded. A tile of rows reads its bitmap as 32-bit words. The position of an entry's
value is a prefix sum: the set bits of all words before, plus the set bits below it in its own word.
The values of one word are neighbours in memory, so the lanes of a warp read them together.

Legend: S rows of a shard, D columns; of a tile: R rows, W words of bitmap, B = 32 bits of a word.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resmoe_dist.codecs import PrunedMatrix

BITS = tl.constexpr(32)
# Numbers in a row of the job table: see `job_fields`.
FIELDS = tl.constexpr(10)
# Words of bitmap counted at a time.
_COUNTED = tl.constexpr(64)


def job_fields(center_SD: Tensor | None, residual: PrunedMatrix | None) -> list[int]:
    """Where the tensors of a job are, for `open_rows`; 0 for what the job lacks.

    Of the centre: 0 address, 1 row stride, 2 column stride, 3 whether there is one. Of the bitmap:
    4 address, 5 row stride, 6 bytes in a row. Of the values: 7 address. Of the row offsets: 8
    address, 9 whether int64.
    """
    fields = [0] * FIELDS.value
    if center_SD is not None:
        fields[:4] = center_SD.data_ptr(), *center_SD.stride(), True
    if residual is not None:
        bitmap, values, offsets = residual.bitmap, residual.values, residual.row_offsets
        assert bitmap.stride(1) == 1 and values.is_contiguous() and offsets.is_contiguous()
        fields[4:7] = bitmap.data_ptr(), bitmap.stride(0), bitmap.shape[1]
        fields[7:] = values.data_ptr(), offsets.data_ptr(), offsets.dtype == torch.int64
    return fields


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
def open_rows(job, row_R, held_R, word, plan: tl.constexpr):
    """Pointers to some rows of a job, for `load_weights`, and ahead_R: the position of the first
    value of bitmap word `word`, relative to the pointer to the row's values.

    job: a row of the job table. row_R: rows of the job's tensors. held_R: which of them to read.
    """
    center = tl.load(job).to(tl.pointer_type(plan.entry))
    row_stride = tl.load(job + 1)
    column_stride = tl.load(job + 2)
    if plan.plain_center:
        center = tl.multiple_of(center, 16)
        row_stride = tl.multiple_of(row_stride, 128 // plan.entry.primitive_bitwidth)
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
    # A block on both sides: the interpreter cannot combine a mask with a scalar condition.
    mask_R = held_R & (tl.zeros_like(row_R) < size)
    low_R = tl.load(job + 8).to(tl.pointer_type(tl.uint32)) + (row_R + back) * (1 + wide)
    high_R = tl.load(low_R + wide, mask=mask_R, other=0).to(tl.int64) * wide
    offset_R = (high_R << 32) + tl.load(low_R, mask=mask_R, other=0)
    values_R = tl.load(job + 7).to(tl.pointer_type(plan.entry)) + offset_R
    rows = (held_R, has_center, center_R, column_stride, bitmap_R, size, values_R)
    return rows, ahead_R


@triton.jit
def word_columns(word_W, low, high):
    """Column [W, B] of each bit of some words, counted from `low`, and whether in [low, high)."""
    column_WB = word_W[:, None] * BITS + tl.arange(0, BITS)[None, :]
    return column_WB - low, (column_WB >= low) & (column_WB < high)


@triton.jit
def load_weights(rows, ahead_R, word_W, low, high, plan: tl.constexpr):
    """Centre + residual [R, W, B] at the columns of some words; float32, zero outside [low, high).

    ahead_R: position of the words' first value. Returns the position after the words, or that of
    the word that holds column `high` if that comes first.
    """
    held_R, has_center, center_R, column_stride, bitmap_R, size, values_R = rows
    column_WB, inside_WB = word_columns(word_W, low, high)
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
