"""Bitmaps: one bit per entry of a matrix, rows padded to whole bytes, lowest bit first.

Legend: R rows, D columns, P = ⌈D/8⌉ bytes per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 8


def bytes_per_row(columns: int) -> int:
    """P = ⌈columns/8⌉."""
    return -(-columns // _BITS)


def pack_bitmap(mask_RD: Tensor) -> Tensor:
    """Boolean mask [R, D] to bytes [R, P] (uint8). Bits past column D are zero."""
    rows, columns = mask_RD.shape
    padded = mask_RD.new_zeros(rows, bytes_per_row(columns) * _BITS)
    padded[:, :columns] = mask_RD
    weights = 2 ** torch.arange(_BITS, device=mask_RD.device, dtype=torch.uint8)
    return (padded.unflatten(1, (-1, _BITS)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bitmap(bitmap_RP: Tensor, columns: int) -> Tensor:
    """Bytes [R, P] back to a boolean mask [R, D]."""
    shifts = torch.arange(_BITS, device=bitmap_RP.device, dtype=torch.uint8)
    bits = bitmap_RP.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(1)
    return bits.flatten(1)[:, :columns].bool()


def has_stray_bits(bitmap_RP: Tensor, columns: int) -> bool:
    """Whether a bit past column D is set, as `pack_bitmap` never does."""
    last_R8 = unpack_bitmap(bitmap_RP[:, -1:], _BITS)
    return bool(last_R8[:, (columns - 1) % _BITS + 1 :].any())
