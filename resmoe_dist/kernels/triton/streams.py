"""Matrices of codec `quantized` in the kernels: decoding the entries of some rows in registers.

Eight entries of b bits each are b bytes of a row's stream, so a tile reads eight at a time: the
aligned 32-bit words that hold them, shifted together into one 64-bit number. A row may begin at any
byte. Every window has its place in that number, and an entry is

    (sum of the four bytes of (window · multiplier + increment) mod 2^32 − offset) · scale

for every coder (see `ByteSum`). What differs between coders is numbers in the job table, so one
launch runs matrices of any bits. Matrices that are rotated are decoded as they are stored.

Legend: of a tile: R rows, W words of 32 entries, B = 32 entries of a word, 4 octets of a word,
8 entries of an octet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resmoe_dist.codecs import QuantizedMatrix
from resmoe_dist.kernels.triton.words import BITS

# Numbers that describe a matrix: see `stream_fields`.
STREAM_FIELDS = tl.constexpr(14)


def stream_fields(matrix: QuantizedMatrix | None) -> list[int]:
    """Where a matrix's tensors are and how they are coded, for `open_stream`; zeros for no matrix.

    Of the codes: 0 address, 1 row stride, 2 bits in a row. Of the scales: 3 address, 4 row stride,
    5 groups in a projection, 6 words in a group, 7 the bits of `top`. 8 columns of a projection. Of
    an entry: 9 bits, 10 bits of its window, 11 multiplier, 12 increment, 13 offset.
    """
    if matrix is None:
        return [0] * STREAM_FIELDS.value
    codes, scales, coder = matrix.codes, matrix.scales, matrix.coder
    assert codes.stride(1) == 1 and scales.stride(1) == 1
    return [
        *(codes.data_ptr(), codes.stride(0), 8 * codes.shape[1]),
        *(scales.data_ptr(), scales.stride(0), scales.shape[1] // matrix.blocks),
        # A group of a whole projection is at least as many words.
        triton.cdiv(matrix.group, BITS.value),
        int(matrix.top.view(torch.int32)),
        matrix.hidden,
        *(coder.bits, coder.window, *coder.byte_sum),
    ]


@triton.jit
def open_stream(matrix, row_R, held_R):
    """Some rows of a matrix, for `load_entries`.

    matrix: the numbers of `stream_fields`. row_R: rows of the matrix. held_R: which to read.
    """
    size = tl.load(matrix + 2).to(tl.int32)
    byte_R = tl.load(matrix) + row_R.to(tl.int64) * tl.load(matrix + 1)
    # The aligned word that holds the row's first byte, and the bits in it before that byte.
    word_R = (byte_R & -4).to(tl.pointer_type(tl.uint32))
    skipped_R = (byte_R & 3).to(tl.int32) * 8
    # No word is read that has no byte of the row.
    count_R = tl.where(held_R, (skipped_R + size + 31) // 32, 0)
    scales_R = tl.load(matrix + 3).to(tl.pointer_type(tl.uint8))
    scales_R += row_R.to(tl.int64) * tl.load(matrix + 4)
    groups = tl.load(matrix + 5).to(tl.int32)
    group_words = tl.load(matrix + 6).to(tl.int32)
    top = tl.load(matrix + 7).to(tl.int32).to(tl.float32, bitcast=True)
    hidden = tl.load(matrix + 8).to(tl.int32)
    bits = tl.load(matrix + 9).to(tl.int32)
    window = tl.load(matrix + 10).to(tl.int32)
    multiplier = tl.load(matrix + 11).to(tl.uint32)
    increment = tl.load(matrix + 12).to(tl.uint32)
    offset = tl.load(matrix + 13).to(tl.int32)
    codes = (word_R, skipped_R, count_R, bits, window)
    scales = (scales_R, held_R, groups, group_words, hidden, top)
    return size, codes, scales, (multiplier, increment, offset)


@triton.jit
def _load_windows(codes, word_W, low):
    """Windows [R, W, 4, 8] of the entries of some words, uint32."""
    word_R, skipped_R, count_R, bits, window = codes
    octet_W4 = word_W[:, None] * 4 + tl.arange(0, 4)[None, :]
    bit_RW4 = skipped_R[:, None, None] + ((low + octet_W4 * 8) * bits)[None, :, :]
    at_RW4, shift_RW4 = bit_RW4 >> 5, (bit_RW4 & 31).to(tl.uint64)
    pointer_RW4, left_RW4 = word_R[:, None, None] + at_RW4, count_R[:, None, None] - at_RW4
    first_RW4 = tl.load(pointer_RW4, mask=left_RW4 > 0, other=0).to(tl.uint64)
    second_RW4 = tl.load(pointer_RW4 + 1, mask=left_RW4 > 1, other=0).to(tl.uint64)
    octet_RW4 = (first_RW4 | (second_RW4 << 32)) >> shift_RW4
    # Windows of 4-bit trellises and of 8 bits may end in a third word.
    more_RW4 = (left_RW4 > 2) & (shift_RW4 + 7 * bits + window > 64)
    third_RW4 = tl.load(pointer_RW4 + 2, mask=more_RW4, other=0).to(tl.uint64)
    # In two steps: a shift by 64 is undefined.
    octet_RW4 |= (third_RW4 << 1) << (63 - shift_RW4)
    shift_8 = (tl.arange(0, 8) * bits).to(tl.uint64)
    window_RW48 = (octet_RW4[:, :, :, None] >> shift_8[None, None, None, :]).to(tl.uint32)
    return window_RW48 & ((1 << window) - 1).to(tl.uint32)


@triton.jit
def _load_scales(scales, word_W, low):
    """Scales [R, W] of some words; zero after the projection's last."""
    scales_R, held_R, groups, group_words, hidden, top = scales
    group_W = low // hidden * groups + word_W // group_words
    mask_RW = held_R[:, None] & (word_W * BITS < hidden)[None, :]
    scale_RW = tl.load(scales_R[:, None] + group_W[None, :], mask=mask_RW, other=0)
    exponent_RW = (scale_RW.to(tl.float32) - 255) / 16
    return tl.where(scale_RW > 0, top * tl.exp2(exponent_RW), 0.0)


@triton.jit
def load_entries(stream, word_W, low):
    """Entries [R, W, B] of some words, as they are coded; float32.

    low: first column of their projection, from which words are counted. Entries of columns after
    the projection are zero or any other number, in words after it zero.
    """
    size, codes, scales, (multiplier, increment, offset) = stream
    R: tl.constexpr = codes[0].shape[0]
    W: tl.constexpr = word_W.shape[0]
    entry_RWB = tl.zeros([R, W, BITS], tl.float32)
    if size > 0:
        hash_RW48 = _load_windows(codes, word_W, low) * multiplier + increment
        # Two sums of two bytes, then both sums.
        pairs_RW48 = (hash_RW48 & 0x00FF00FF) + ((hash_RW48 >> 8) & 0x00FF00FF)
        sum_RW48 = (pairs_RW48 & 0xFFFF) + (pairs_RW48 >> 16)
        integer_RWB = tl.reshape(sum_RW48.to(tl.int32) - offset, [R, W, BITS])
        entry_RWB = integer_RWB.to(tl.float32) * _load_scales(scales, word_W, low)[:, :, None]
    return entry_RWB
