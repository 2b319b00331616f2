"""Residuals of codec `pruned` in the kernels: reading the kept entries of some rows.

A tile of rows reads its bitmap as 32-bit words. The position of an entry's value is a prefix sum:
the set bits of all words before, plus the set bits below it in its own word. The values of one word
are neighbours in memory, so the lanes of a warp read them together.

Legend: of a tile: R rows, W words of bitmap, B = 32 bits of a word.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resmoe_dist.codecs import PrunedMatrix
from resmoe_dist.kernels.triton.columns import BITS

# Numbers that describe a matrix: see `bitmap_fields`.
BITMAP_FIELDS = tl.constexpr(6)
# Words of bitmap counted at a time.
_COUNTED = tl.constexpr(64)


def bitmap_fields(matrix: PrunedMatrix | None) -> list[int]:
    """Where a matrix's tensors are, for `open_bitmap`; zeros for no matrix.

    Of the bitmap: 0 address, 1 row stride, 2 bytes in a row. Of the values: 3 address. Of the row
    offsets: 4 address, 5 whether int64.
    """
    if matrix is None:
        return [0] * BITMAP_FIELDS.value
    bitmap, values, offsets = matrix.bitmap, matrix.values, matrix.row_offsets
    assert bitmap.stride(1) == 1 and values.is_contiguous() and offsets.is_contiguous()
    return [
        *(bitmap.data_ptr(), bitmap.stride(0), bitmap.shape[1]),
        *(values.data_ptr(), offsets.data_ptr(), offsets.dtype == torch.int64),
    ]


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
def open_bitmap(matrix, row_R, held_R, word, plan: tl.constexpr):
    """Pointers to some rows of a matrix, for `load_kept`, and ahead_R: the position of the first
    value of bitmap word `word`, relative to the pointer to the row's values.

    matrix: the numbers of `bitmap_fields`. row_R: rows of the matrix. held_R: which to read.
    """
    bitmap = tl.load(matrix).to(tl.pointer_type(tl.uint8))
    bitmap_R = bitmap + row_R.to(tl.int64) * tl.load(matrix + 1)
    size = tl.load(matrix + 2).to(tl.int32)

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
    wide = tl.load(matrix + 5)
    # A block on both sides: the interpreter cannot combine a mask with a scalar condition.
    mask_R = held_R & (tl.zeros_like(row_R) < size)
    low_R = tl.load(matrix + 4).to(tl.pointer_type(tl.uint32)) + (row_R + back) * (1 + wide)
    high_R = tl.load(low_R + wide, mask=mask_R, other=0).to(tl.int64) * wide
    offset_R = (high_R << 32) + tl.load(low_R, mask=mask_R, other=0)
    values_R = tl.load(matrix + 3).to(tl.pointer_type(plan.entry)) + offset_R
    return (held_R, bitmap_R, size, values_R), ahead_R


@triton.jit
def load_kept(rows, ahead_R, word, inside_WB, high, plan: tl.constexpr):
    """Kept entries [R, W, B] of the tile that begins with a word; float32, zero where not
    `inside_WB`.

    ahead_R: position of the word's first value. Returns the position after the tile, or that of the
    word that holds column `high` if that comes first.
    """
    held_R, bitmap_R, size, values_R = rows
    word_W = word + tl.arange(0, plan.W)
    kept_RWB = tl.zeros([plan.R, plan.W, BITS], tl.float32)
    if size > 0:
        word_RW = _load_words(bitmap_R, size, held_R, word_W, size, plan)
        counts_RW = _popcount(word_RW)
        first_RW = ahead_R[:, None] + tl.cumsum(counts_RW, 1) - counts_RW
        bit_1B = (tl.full([BITS], 1, tl.uint32) << tl.arange(0, BITS).to(tl.uint32))[None, :]
        lower_RWB = word_RW[:, :, None] & (bit_1B - 1)[None, :, :]
        value_RWB = values_R[:, None, None] + (first_RW[:, :, None] + _popcount(lower_RWB))
        # Columns outside are masked once for all rows, not per entry.
        mask_RWB = (word_RW[:, :, None] & tl.where(inside_WB, bit_1B, 0)[None, :, :]) != 0
        kept_RWB = tl.load(value_RWB, mask=mask_RWB, other=0.0).to(tl.float32)
        ahead_R += tl.sum(tl.where((word_W < high // BITS)[None, :], counts_RW, 0), 1)
    return kept_RWB, ahead_R
