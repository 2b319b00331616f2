"""Matrices of codec `quantized` in the kernels: decoding the entries of some rows in registers.

Eight entries of b bits are b bytes of a row's stream. So a lane decodes eight at a time, an octet:
it reads the aligned 32-bit words that hold them and shifts them together into one 64-bit number.
Neighbouring lanes read neighbouring words. A row may begin at any byte. Entries are

    (sum of the four bytes of a hash of the window − offset) · scale

for every coder (see `ByteSum`). Codings differ only by numbers in the job table, so one launch runs
matrices of any bits. Matrices that are rotated are decoded as they are stored.

Legend: of a tile: R rows, X = 8 entries of an octet, Y octets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resmoe_dist.codecs import QuantizedMatrix
from resmoe_dist.kernels.triton.columns import BITS, OCTET

# Numbers that describe a matrix: see `stream_fields`.
STREAM_FIELDS = tl.constexpr(17)


def stream_fields(matrix: QuantizedMatrix | None) -> list[int]:
    """Where a matrix's tensors are and how it is coded, for `open_stream`; zeros for no matrix.

    0 whether there is one. Of the codes: 1 address, 2 row stride, 3 bits in a row. Of the scales: 4
    address, 5 row stride, 6 groups in a projection, 7 octets in a group, 8 bits of the float32
    `top`. 9 columns of a projection. Of an entry: 10 bits, 11 bits of its window; of
    the hash: 12 mark, 13 and 14 factors, 15 flipped bits, 16 offset.
    """
    if matrix is None:
        return [0] * STREAM_FIELDS.value
    codes, scales, coder = matrix.codes, matrix.scales, matrix.coder
    code = coder.byte_sum
    assert codes.stride(1) == 1 and scales.stride(1) == 1
    return [
        *(True, codes.data_ptr(), codes.stride(0), 8 * codes.shape[1]),
        *(scales.data_ptr(), scales.stride(0), scales.shape[1] // matrix.blocks),
        # Rounded up for a group of a whole projection.
        *(triton.cdiv(matrix.group, OCTET.value), int(matrix.top.view(torch.int32))),
        *(matrix.hidden, coder.bits, coder.window),
        *(code.mark, *code.factors, code.flipped, code.offset),
    ]


@triton.jit
def open_stream(matrix, row_R, held_R):
    """Some rows of a matrix, for `load_entries`.

    matrix: the numbers of `stream_fields`. row_R: rows of the matrix. held_R: which to read.
    """
    row_R = row_R.to(tl.int64)
    byte_R = tl.load(matrix + 1) + row_R * tl.load(matrix + 2)
    # The aligned word that holds the row's first byte, and the bits in it before that byte.
    word_R = (byte_R & -4).to(tl.pointer_type(tl.uint32))
    skipped_R = (byte_R & 3).to(tl.int32) * 8
    # Words that hold bits of the row. Those after them may be out of bounds.
    words_R = (skipped_R + tl.load(matrix + 3).to(tl.int32) + 31) // 32
    scale_R = tl.load(matrix + 4).to(tl.pointer_type(tl.uint8)) + row_R * tl.load(matrix + 5)
    groups = tl.load(matrix + 6).to(tl.int32)
    group_octets = tl.load(matrix + 7).to(tl.int32)
    top = tl.load(matrix + 8).to(tl.int32).to(tl.float32, bitcast=True)
    hidden = tl.load(matrix + 9).to(tl.int32)
    bits = tl.load(matrix + 10).to(tl.int32)
    window = tl.load(matrix + 11).to(tl.int32)
    mark = tl.load(matrix + 12).to(tl.uint32)
    first = tl.load(matrix + 13).to(tl.uint32)
    second = tl.load(matrix + 14).to(tl.uint32)
    flipped = tl.load(matrix + 15).to(tl.uint32)
    offset = tl.load(matrix + 16).to(tl.int32)
    codes = (word_R, skipped_R, tl.where(held_R, words_R, 0), bits, window)
    scales = (scale_R, held_R, groups, group_octets, top, hidden)
    return tl.load(matrix) > 0, codes, (mark, first, second, flipped, offset), scales


@triton.jit
def _load_windows(codes, octet_Y, low):
    """Windows [R, X, Y] of the entries of some octets, uint32."""
    word_R, skipped_R, words_R, bits, window = codes
    bit_RY = skipped_R[:, None] + ((low + octet_Y * OCTET) * bits)[None, :]
    at_RY, shift_RY = bit_RY >> 5, (bit_RY & 31).to(tl.uint64)
    pointer_RY, left_RY = word_R[:, None] + at_RY, words_R[:, None] - at_RY
    first_RY = tl.load(pointer_RY, mask=left_RY > 0, other=0).to(tl.uint64)
    second_RY = tl.load(pointer_RY + 1, mask=left_RY > 1, other=0).to(tl.uint64)
    third_RY = tl.load(pointer_RY + 2, mask=left_RY > 2, other=0).to(tl.uint64)
    lower_RY = ((first_RY | (second_RY << 32)) >> shift_RY).to(tl.uint32).to(tl.uint64)
    octets_RY = lower_RY | (((second_RY | (third_RY << 32)) >> shift_RY) << 32)
    shift_X = (tl.arange(0, OCTET) * bits).to(tl.uint64)
    window_RXY = (octets_RY[:, None, :] >> shift_X[None, :, None]).to(tl.uint32)
    return window_RXY & ((1 << window) - 1).to(tl.uint32)


@triton.jit
def _load_scales(scales, octet_Y, low):
    """Scales [R, Y] of some octets; zero after the projection's last."""
    scale_R, held_R, groups, group_octets, top, hidden = scales
    group_Y = low // hidden * groups + octet_Y // group_octets
    mask_RY = held_R[:, None] & (octet_Y * OCTET < hidden)[None, :]
    stored_RY = tl.load(scale_R[:, None] + group_Y[None, :], mask=mask_RY, other=0)
    scale_RY = top * tl.exp2((stored_RY.to(tl.float32) - 255) / 16)
    return tl.where(stored_RY > 0, scale_RY, 0.0)


@triton.jit
def load_entries(stream, word, low, plan: tl.constexpr):
    """Entries [R, X, Y] of the tile that begins with a word, as they are coded, float32.

    low: first column of their projection, from which words are counted. Entries of the octet in
    which the projection ends are any finite number after its end; those of octets after it are 0.
    """
    is_there, codes, byte_sum, scales = stream
    mark, first, second, flipped, offset = byte_sum
    entry_RXY = tl.zeros([plan.R, plan.X, plan.Y], tl.float32)
    if is_there:
        octet_Y = word * (BITS // OCTET) + tl.arange(0, plan.Y)
        window_RXY = _load_windows(codes, octet_Y, low) | mark
        hash_RXY = ((window_RXY * first) & 0xFFFF) | ((window_RXY * second) << 16)
        hash_RXY ^= flipped
        # Two sums of two bytes, then both sums in the upper half.
        pair_RXY = (hash_RXY & 0x00FF00FF) + ((hash_RXY >> 8) & 0x00FF00FF)
        sum_RXY = (pair_RXY * 0x00010001).to(tl.int32) - (offset << 16)
        scale_RY = _load_scales(scales, octet_Y, low)
        entry_RXY = (sum_RXY >> 16).to(tl.float32) * scale_RY[:, None, :]
    return entry_RXY
