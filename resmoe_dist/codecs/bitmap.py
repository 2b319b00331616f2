"""Bitmaps: one bit per entry of a matrix, rows padded to whole bytes, lowest bit first.

Legend: R rows, D columns, P = ⌈D/8⌉ bytes per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 8
# One bit per byte of a word (little-endian, as all that torch runs on): bits 7, 14 … 56; bit 0 of
# each byte; bit i of byte i, as a signed number.
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_DIAGONAL = 0x8040201008040201 - (1 << 64)


def bytes_per_row(columns: int) -> int:
    """P = ⌈columns/8⌉."""
    return -(-columns // _BITS)


def pack_bitmap(mask_RD: Tensor) -> Tensor:
    """Boolean mask [R, D] to bytes [R, P] (uint8). Bits past column D are zero."""
    rows, columns = mask_RD.shape
    padded = mask_RD.new_zeros(rows, bytes_per_row(columns) * _BITS)
    padded[:, :columns] = mask_RD
    # Eight booleans are a word with a bit in each byte; the product brings bit 8·i to bit 56 + i.
    words_RP = padded.view(torch.int64)
    return ((words_RP * _GATHER) >> 56).bitwise_and_(0xFF).to(torch.uint8)


def unpack_bitmap(bitmap_RP: Tensor, columns: int) -> Tensor:
    """Bytes [R, P] back to a boolean mask [R, D]."""
    # The other way: the byte in all eight bytes of a word, of each of which one bit counts.
    words_RP = (bitmap_RP.long() * _SPREAD).bitwise_and_(_DIAGONAL)
    return (words_RP.view(torch.uint8) != 0)[:, :columns]


def has_stray_bits(bitmap_RP: Tensor, columns: int) -> bool:
    """Whether a bit past column D is set, as `pack_bitmap` never does."""
    last_R8 = unpack_bitmap(bitmap_RP[:, -1:], _BITS)
    return bool(last_R8[:, (columns - 1) % _BITS + 1 :].any())
