"""`low_rank`: a matrix by its leading singular vectors.

Paper 001, appendix A.4 (SVD of the concatenated matrix). `left` has one row per neuron and is
sharded with the rows; `right` is shared by all rows, so every tensor-parallel rank holds it whole.

Legend: I rows, R rows held here, D columns, r rank, C columns of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from resmoe_dist.codecs.base import BudgetConfig, EncodedMatrix, StoredTensor, TensorReader
from resmoe_dist.codecs.moments import Moments
from resmoe_dist.codecs.registry import register_codec
from resmoe_dist.codecs.svd import low_rank_factors


class LowRankConfig(BudgetConfig):
    """rank: of the two factors; without it, the rank whose factors hold the share `keep`."""

    rank: int | None = Field(default=None, ge=1, description="rank (default: what fits `keep`)")

    def rank_of(self, rows: int, columns: int) -> int:
        """The rank for a matrix [rows, columns]: keep·I·D / (I + D), at least 1.

        At most min(I, D), where the factorisation is exact. keep = 1 asks for that.
        """
        if self.rank is not None:
            return min(self.rank, rows, columns)
        if self.keep >= 1:
            return min(rows, columns)
        rank = int(self.keep * rows * columns / (rows + columns))
        return min(max(rank, 1), rows, columns)


@register_codec
class LowRankMatrix(EncodedMatrix):
    """left [R, r] · right [r, D]."""

    name = "low_rank"
    config = LowRankConfig
    stored = {"left": StoredTensor("values"), "right": StoredTensor("values", per_row=False)}

    left: Tensor
    right: Tensor

    @classmethod
    def encode(
        cls,
        matrix_ID: Tensor,
        config: Any,
        dtype: torch.dtype,
        mask_ID: Tensor | None = None,
        moments: Moments | None = None,
    ) -> LowRankMatrix:
        rows, columns = matrix_ID.shape
        left_Ir, right_rD = low_rank_factors(matrix_ID.float(), config.rank_of(rows, columns))
        left, right = left_Ir.to(dtype).contiguous(), right_rD.to(dtype).contiguous()
        return cls((rows, columns), {"left": left, "right": right}, dtype)

    @classmethod
    def read(
        cls, read: TensorReader, columns: int, start: int, stop: int, dtype: torch.dtype
    ) -> LowRankMatrix:
        found = super().read(read, columns, start, stop, dtype)
        if found.left.shape[1] != found.right.shape[0]:
            raise ValueError(f"factors of rank {found.left.shape[1]} and {found.right.shape[0]}")
        return found

    @classmethod
    def shapes(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        return {"left": (rows, None), "right": (None, columns)}

    @classmethod
    def stored_bytes(cls, rows: int, columns: int, config: LowRankConfig, itemsize: int) -> int:
        return config.rank_of(rows, columns) * (rows + columns) * itemsize

    @classmethod
    def sliced_bytes(
        cls, rows: int, columns: int, held: int, config: LowRankConfig, itemsize: int
    ) -> int:
        return config.rank_of(rows, columns) * (held + columns) * itemsize

    def decode(self) -> Tensor:
        return self.left @ self.right

    def add_to(self, dense_RC: Tensor, first_column: int = 0) -> None:
        columns = slice(first_column, first_column + dense_RC.shape[1])
        dense_RC.addmm_(self.left, self.right[:, columns])

    def multiply(self, x_NH: Tensor, first_column: int) -> Tensor:
        right_rH = self.right[:, first_column : first_column + x_NH.shape[1]]
        return ((x_NH @ right_rH.T) @ self.left.T).float()

    def multiply_back(self, h_NR: Tensor, first_column: int, hidden: int) -> Tensor:
        right_rH = self.right[:, first_column : first_column + hidden]
        return ((h_NR @ self.left) @ right_rH).float()
