"""`pruned`: an unstructured mask as a bitmap, the kept values in row order, one offset per row.

Paper 001, section 4.3: the entries of the residual with the largest magnitude are kept. In bf16 an
entry costs 1 + 16·keep bits (and 32 bits per row for the offset).

Legend: I rows, R rows held here, D columns, P = ⌈D/8⌉ bytes of bitmap per row, V kept values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resmoe_dist.codecs.base import EncodedResidual, TensorReader, Weights
from resmoe_dist.codecs.bitmap import bytes_per_row, has_stray_bits, pack_bitmap, unpack_bitmap
from resmoe_dist.kernels import dispatch
from resmoe_dist.kernels.rows import CompressedRows

# So many values, and their offsets need 64 bits.
_INT32_VALUES = 2**31


def largest_entries(residual_ID: Tensor, keep: float) -> Tensor:
    """Boolean mask [I, D] of the ⌊keep·I·D⌋ entries of largest magnitude."""
    count = int(keep * residual_ID.numel())
    mask = torch.zeros(residual_ID.numel(), dtype=torch.bool, device=residual_ID.device)
    if count:
        mask[residual_ID.abs().flatten().topk(count, sorted=False).indices] = True
    return mask.view_as(residual_ID)


class PrunedResidual(EncodedResidual):
    """bitmap [R, P] uint8, values [V], row_offsets [R+1] int32: values of row i lie at
    [row_offsets[i], row_offsets[i+1])."""

    name = "pruned"
    chooses_entries = True

    bitmap: Tensor
    values: Tensor
    row_offsets: Tensor

    @classmethod
    def encode(
        cls, residual_ID: Tensor, *, keep: float, dtype: torch.dtype, mask_ID: Tensor | None = None
    ) -> PrunedResidual:
        """Keep the entries of `mask_ID` where given, else the share `keep` of largest magnitude."""
        if mask_ID is None:
            mask_ID = largest_entries(residual_ID, keep)
        return cls(
            residual_ID.shape[1],
            {
                "bitmap": pack_bitmap(mask_ID),
                "values": residual_ID[mask_ID].to(dtype),
                "row_offsets": _row_offsets(mask_ID.sum(1)),
            },
        )

    @classmethod
    def read(cls, read: TensorReader, columns: int, start: int, stop: int) -> PrunedResidual:
        row_offsets = read("row_offsets", start, stop + 1)
        first, last = int(row_offsets[0]), int(row_offsets[-1])
        bitmap = read("bitmap", start, stop)
        if not torch.equal(_popcount(bitmap).sum(1), row_offsets.diff().long()):
            raise ValueError("the bitmap and the row offsets disagree")
        if has_stray_bits(bitmap, columns):
            raise ValueError(f"the bitmap has bits past column {columns}")
        values = read("values", first, last)
        if values.shape[0] != last - first:
            raise ValueError(f"{values.shape[0]} values where the offsets promise {last - first}")
        return cls(
            columns, {"bitmap": bitmap, "values": values, "row_offsets": row_offsets - first}
        )

    @classmethod
    def expected_tensors(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        return {
            "bitmap": (rows, bytes_per_row(columns)),
            "values": (None,),
            "row_offsets": (rows + 1,),
        }

    @classmethod
    def stored_bytes(cls, rows: int, columns: int, keep: float, itemsize: int) -> int:
        # Experts that share a budget may round theirs up.
        values = math.ceil(keep * rows * columns)
        offset = 4 if values < _INT32_VALUES else 8
        return rows * bytes_per_row(columns) + values * itemsize + (rows + 1) * offset

    @property
    def rows(self) -> int:
        return self.bitmap.shape[0]

    def decode(self) -> Tensor:
        dense_RD = self.values.new_zeros(self.rows, self.columns)
        return dense_RD.masked_scatter_(unpack_bitmap(self.bitmap, self.columns), self.values)

    def slice_rows(self, start: int, stop: int) -> PrunedResidual:
        first, last = int(self.row_offsets[start]), int(self.row_offsets[stop])
        return PrunedResidual(
            self.columns,
            {
                "bitmap": self.bitmap[start:stop],
                "values": self.values[first:last],
                "row_offsets": self.row_offsets[start : stop + 1] - first,
            },
        )

    def restore(
        self, center_RD: Tensor | None, out: Tensor, first_row: int = 0, first_column: int = 0
    ) -> None:
        rows = slice(first_row, first_row + out.shape[0])
        center = None if center_RD is None else center_RD[rows]
        # Offsets count from the first value of all, wherever the rows begin.
        offsets = self.row_offsets[rows.start : rows.stop + 1]
        part = CompressedRows(center, self.bitmap[rows], self.values, offsets)
        dispatch.restore(part, out, first_column)

    @classmethod
    def project_in(
        cls, x_TH: Tensor, token_N: Tensor, counts_J: list[int], jobs: list[Weights], inputs: int
    ) -> Tensor:
        rows = [_compressed_rows(weights) for weights in jobs]
        return dispatch.project_in(x_TH, token_N, counts_J, rows, inputs)

    @classmethod
    def project_out(
        cls,
        h_NR: Tensor,
        token_N: Tensor,
        counts_J: list[int],
        jobs: list[Weights],
        inputs: int,
        num_tokens: int,
        hidden: int,
    ) -> Tensor:
        rows = [_compressed_rows(weights) for weights in jobs]
        return dispatch.project_out(h_NR, token_N, counts_J, rows, inputs, num_tokens, hidden)

    @classmethod
    def fuses_mlp(cls, device: torch.device, dtype: torch.dtype, activation: str) -> bool:
        return dispatch.fuses_mlp(device, dtype, activation)

    @classmethod
    def mlp(
        cls,
        x_TH: Tensor,
        token_N: Tensor,
        weight_N: Tensor,
        counts_J: list[int],
        jobs: list[Weights],
        centers: list[Tensor],
        center_J: list[int],
        inputs: int,
        activation: str,
    ) -> Tensor:
        rows = [_compressed_rows(weights) for weights in jobs]
        return dispatch.mlp(
            x_TH, token_N, weight_N, counts_J, rows, centers, center_J, inputs, activation
        )

    @classmethod
    def join_rows(cls, parts: list[PrunedResidual]) -> PrunedResidual:
        counts_I = torch.cat([part.row_offsets.diff() for part in parts])
        return cls(
            parts[0].columns,
            {
                "bitmap": torch.cat([part.bitmap for part in parts]),
                "values": torch.cat([part.values for part in parts]),
                "row_offsets": _row_offsets(counts_I),
            },
        )


def _compressed_rows(weights: Weights) -> CompressedRows:
    if weights.residual is None:
        return CompressedRows(weights.center)
    # Not by attribute: a module's take a microsecond each, which one token notices.
    stored = weights.residual._buffers
    return CompressedRows(weights.center, stored["bitmap"], stored["values"], stored["row_offsets"])


def _row_offsets(counts_I: Tensor) -> Tensor:
    """[I + 1]: where each row's values begin, and where the last one's end."""
    offsets = torch.zeros(len(counts_I) + 1, dtype=torch.int64, device=counts_I.device)
    torch.cumsum(counts_I, 0, out=offsets[1:])
    return offsets.int() if int(offsets[-1]) < _INT32_VALUES else offsets


def _popcount(bytes_RP: Tensor) -> Tensor:
    """Set bits of each byte, by halves (no table, no widening)."""
    pairs = bytes_RP - (bytes_RP.bitwise_right_shift(1) & 0x55)
    nibbles = (pairs & 0x33) + (pairs.bitwise_right_shift(2) & 0x33)
    return (nibbles + nibbles.bitwise_right_shift(4)) & 0x0F
