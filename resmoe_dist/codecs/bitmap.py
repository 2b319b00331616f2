"""Bitmaps: one bit per entry of a matrix, rows padded to whole bytes, lowest bit first.

Legend: R rows, D columns, P = ⌈D/8⌉ bytes per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 8
# Masks for eight bytes in a 64-bit word. Words are little-endian, as on every platform of torch.
# _GATHER: bits 7, 14 … 56. _SPREAD: bit 0 of each byte. _DIAGONAL: bit i of byte i, signed.
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
    # Eight booleans form a word with one bit per byte; the product moves bit 8·i to bit 56 + i.
    words_RP = padded.view(torch.int64)
    return ((words_RP * _GATHER) >> 56).bitwise_and_(0xFF).to(torch.uint8)


def unpack_bitmap(bitmap_RP: Tensor, columns: int) -> Tensor:
    """Bytes [R, P] back to a boolean mask [R, D]."""
    # Inverse: repeat the byte eight times in a word, keep bit i of copy i.
    rows, row_bytes = bitmap_RP.shape
    words = (bitmap_RP.long() * _SPREAD).bitwise_and_(_DIAGONAL).flatten()
    return (words.view(torch.uint8).view(rows, _BITS * row_bytes) != 0)[:, :columns]


def has_stray_bits(bitmap_RP: Tensor, columns: int) -> bool:
    """Whether a padding bit past column D is set. `pack_bitmap` never sets one."""
    last_R8 = unpack_bitmap(bitmap_RP[:, -1:], _BITS)
    return bool(last_R8[:, (columns - 1) % _BITS + 1 :].any())
