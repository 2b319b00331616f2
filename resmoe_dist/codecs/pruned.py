"""`pruned`: the kept entries of a matrix, as a bitmap, the values in row order and row offsets.

Paper 001, section 4.3: the entries of the residual with the largest magnitude are kept. In bfloat16
an entry costs 1 + 16·keep bits, plus 32 bits per row for the offset.

Legend: I rows, R rows held here, D columns, P = ⌈D/8⌉ bytes of bitmap per row, V kept values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from resmoe_dist.codecs.base import BudgetConfig, EncodedMatrix, StoredTensor, TensorReader
from resmoe_dist.codecs.bitmap import bytes_per_row, has_stray_bits, pack_bitmap, unpack_bitmap
from resmoe_dist.codecs.moments import Moments
from resmoe_dist.codecs.registry import register_codec

# From this many values on, offsets need 64 bits.
_INT32_VALUES = 2**31


class PrunedConfig(BudgetConfig):
    """keep: share of the entries kept."""


def largest_entries(matrix_ID: Tensor, keep: float) -> Tensor:
    """Boolean mask [I, D] of the ⌊keep·I·D⌋ entries of largest magnitude."""
    count = int(keep * matrix_ID.numel())
    mask = torch.zeros(matrix_ID.numel(), dtype=torch.bool, device=matrix_ID.device)
    if count:
        mask[matrix_ID.abs().flatten().topk(count, sorted=False).indices] = True
    return mask.view_as(matrix_ID)


@register_codec
class PrunedMatrix(EncodedMatrix):
    """bitmap [R, P], values [V], row_offsets [R + 1].

    The values of row i are values[row_offsets[i] : row_offsets[i+1]].
    """

    name = "pruned"
    config = PrunedConfig
    stored = {
        "bitmap": StoredTensor("indices", dtypes=(torch.uint8,)),
        "values": StoredTensor("values"),
        "row_offsets": StoredTensor("indices", dtypes=(torch.int32, torch.int64)),
    }
    selects_entries = True

    bitmap: Tensor
    values: Tensor
    row_offsets: Tensor

    @classmethod
    def encode(
        cls,
        matrix_ID: Tensor,
        config: Any,
        dtype: torch.dtype,
        mask_ID: Tensor | None = None,
        moments: Moments | None = None,
    ) -> PrunedMatrix:
        if mask_ID is None:
            mask_ID = largest_entries(matrix_ID, config.keep)
        rows, columns = matrix_ID.shape
        tensors = {
            "bitmap": pack_bitmap(mask_ID),
            "values": matrix_ID[mask_ID].to(dtype),
            "row_offsets": row_offsets_of(mask_ID.sum(1)),
        }
        return cls((rows, columns), tensors, dtype)

    @classmethod
    def read(
        cls, read: TensorReader, columns: int, start: int, stop: int, dtype: torch.dtype
    ) -> PrunedMatrix:
        row_offsets = read("row_offsets", start, stop + 1)
        first, last = int(row_offsets[0]), int(row_offsets[-1])
        bitmap = read("bitmap", start, stop)
        if not torch.equal(_popcount(bitmap).sum(1), row_offsets.diff().long()):
            raise ValueError("the bitmap and the row offsets disagree")
        if has_stray_bits(bitmap, columns):
            raise ValueError(f"the bitmap has bits past column {columns}")
        values = read("values", first, last)
        if values.shape[0] != last - first:
            raise ValueError(f"{values.shape[0]} values, the row offsets say {last - first}")
        tensors = {"bitmap": bitmap, "values": values, "row_offsets": row_offsets - first}
        return cls((stop - start, columns), tensors, dtype)

    @classmethod
    def shapes(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        return {
            "bitmap": (rows, bytes_per_row(columns)),
            "values": (None,),
            "row_offsets": (rows + 1,),
        }

    @classmethod
    def stored_bytes(cls, rows: int, columns: int, config: PrunedConfig, itemsize: int) -> int:
        # Rounded up: experts that share a budget may keep one value more than their share.
        values = math.ceil(config.keep * rows * columns)
        offset = 4 if values < _INT32_VALUES else 8
        return rows * bytes_per_row(columns) + values * itemsize + (rows + 1) * offset

    @classmethod
    def sliced_bytes(
        cls, rows: int, columns: int, held: int, config: PrunedConfig, itemsize: int
    ) -> int:
        # Each slice has an offset more than rows.
        return cls.stored_bytes(held, columns, config, itemsize)

    def decode(self) -> Tensor:
        dense_RD = self.values.new_zeros(self.rows, self.columns)
        return dense_RD.masked_scatter_(unpack_bitmap(self.bitmap, self.columns), self.values)

    def slice_rows(self, start: int, stop: int) -> PrunedMatrix:
        first, last = int(self.row_offsets[start]), int(self.row_offsets[stop])
        tensors = {
            "bitmap": self.bitmap[start:stop],
            "values": self.values[first:last],
            "row_offsets": self.row_offsets[start : stop + 1] - first,
        }
        return PrunedMatrix((stop - start, self.columns), tensors, self.dtype)

    @classmethod
    def join_rows(cls, parts: list[PrunedMatrix]) -> PrunedMatrix:
        counts_I = torch.cat([part.row_offsets.diff() for part in parts])
        tensors = {
            "bitmap": torch.cat([part.bitmap for part in parts]),
            "values": torch.cat([part.values for part in parts]),
            "row_offsets": row_offsets_of(counts_I),
        }
        return cls((len(counts_I), parts[0].columns), tensors, parts[0].dtype)


def row_offsets_of(counts_I: Tensor) -> Tensor:
    """[I + 1]: where each row's values begin, and where the last row's values end."""
    offsets = torch.zeros(len(counts_I) + 1, dtype=torch.int64, device=counts_I.device)
    torch.cumsum(counts_I, 0, out=offsets[1:])
    return offsets.int() if int(offsets[-1]) < _INT32_VALUES else offsets


def _popcount(bytes_RP: Tensor) -> Tensor:
    """Set bits of each byte, by pairwise sums (no lookup table, no wider integers)."""
    pairs = bytes_RP - (bytes_RP.bitwise_right_shift(1) & 0x55)
    nibbles = (pairs & 0x33) + (pairs.bitwise_right_shift(2) & 0x33)
    return (nibbles + nibbles.bitwise_right_shift(4)) & 0x0F
