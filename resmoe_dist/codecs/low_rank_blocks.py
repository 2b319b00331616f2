"""`low_rank_blocks`: blocks of columns, each by its own leading singular vectors.

Paper 001, appendix A.5 (SVD) with each projection by itself: block j of the design matrix
[gate | up | downᵀ | biases] is projection j with its row bias. `left` has one row per neuron and is
sharded with the rows; `right` is shared by all rows, so every tensor-parallel rank holds it whole.

Legend: I rows, R rows held here, D columns, b blocks, F = ⌊D/b⌋ columns of a block without its
bias, W = ⌈D/b⌉ with it, r rank, N copies, H hidden, C columns of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from resmoe_dist.codecs.base import BudgetConfig, EncodedMatrix, StoredTensor, TensorReader
from resmoe_dist.codecs.moments import Moments
from resmoe_dist.codecs.registry import register_codec
from resmoe_dist.codecs.svd import low_rank_factors


class LowRankBlocksConfig(BudgetConfig):
    """blocks: of columns. rank: of each block; without it, the one that fits `keep`."""

    blocks: int = Field(default=3, ge=1, description="blocks of columns: 3 gated, 2 two-layer")
    rank: int | None = Field(default=None, ge=1, description="rank (default: what fits `keep`)")

    def rank_of(self, rows: int, columns: int) -> int:
        """The rank of each block of a matrix [rows, columns].

        keep·I·D / (b·(I + W)), at least 1: then all factors hold the share `keep` of the entries.
        At most min(I, W), where the factorisation is exact. keep = 1 asks for that.
        """
        width = -(-columns // self.blocks)
        if self.rank is not None:
            return min(self.rank, rows, width)
        if self.keep >= 1:
            return min(rows, width)
        rank = int(self.keep * rows * columns / (self.blocks * (rows + width)))
        return min(max(rank, 1), rows, width)


@register_codec
class LowRankBlocksMatrix(EncodedMatrix):
    """Block j is left[:, j] [R, r] · right[j] [r, W]."""

    name = "low_rank_blocks"
    config = LowRankBlocksConfig
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
    ) -> LowRankBlocksMatrix:
        rank = config.rank_of(*matrix_ID.shape)
        blocks = split_blocks(matrix_ID.float(), config.blocks)
        factors = [low_rank_factors(block_IW, rank) for block_IW in blocks]
        return cls.of_factors(factors, matrix_ID.shape[1], dtype)

    @classmethod
    def of_factors(
        cls, factors: Sequence[tuple[Tensor, Tensor]], columns: int, dtype: torch.dtype
    ) -> LowRankBlocksMatrix:
        """From left [I, r] and right [r, W] of each block of a matrix with D = `columns`."""
        left = torch.stack([left_Ir for left_Ir, _ in factors], dim=1).to(dtype).contiguous()
        right = torch.stack([right_rW for _, right_rW in factors]).to(dtype).contiguous()
        return cls((left.shape[0], columns), {"left": left, "right": right}, dtype)

    @classmethod
    def read(
        cls, read: TensorReader, columns: int, start: int, stop: int, dtype: torch.dtype
    ) -> LowRankBlocksMatrix:
        found = super().read(read, columns, start, stop, dtype)
        if found.left.dim() != 3 or found.right.dim() != 3:
            raise ValueError(f"factors of {found.left.dim()} and {found.right.dim()} dimensions")
        (_, blocks, rank), (also_blocks, also_rank, width) = found.left.shape, found.right.shape
        if (blocks, rank) != (also_blocks, also_rank):
            raise ValueError(
                f"{blocks} and {also_blocks} blocks of factors of rank {rank} and {also_rank}"
            )
        if not blocks or width != -(-columns // blocks):
            raise ValueError(f"{blocks} blocks of {width} columns, the matrix has {columns}")
        return found

    @classmethod
    def shapes(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        return {"left": (rows, None, None), "right": (None, None, None)}

    @classmethod
    def stored_bytes(
        cls, rows: int, columns: int, config: LowRankBlocksConfig, itemsize: int
    ) -> int:
        return cls._factor_bytes(rows, columns, rows, config, itemsize)

    @classmethod
    def sliced_bytes(
        cls, rows: int, columns: int, held: int, config: LowRankBlocksConfig, itemsize: int
    ) -> int:
        return cls._factor_bytes(rows, columns, held, config, itemsize)

    @classmethod
    def _factor_bytes(
        cls, rows: int, columns: int, held: int, config: LowRankBlocksConfig, itemsize: int
    ) -> int:
        width = -(-columns // config.blocks)
        return config.blocks * config.rank_of(rows, columns) * (held + width) * itemsize

    def decode(self) -> Tensor:
        blocks = [self.left[:, j] @ self.right[j] for j in range(len(self.right))]
        return join_blocks(blocks, self.columns)

    def add_to(self, dense_RC: Tensor, first_column: int = 0) -> None:
        factors = self._factors(first_column, dense_RC.shape[1])
        if factors is None:
            super().add_to(dense_RC, first_column)
        else:
            dense_RC.addmm_(factors[0], factors[1])

    def multiply(self, x_NH: Tensor, first_column: int) -> Tensor:
        factors = self._factors(first_column, x_NH.shape[1])
        if factors is None:
            return super().multiply(x_NH, first_column)
        left_Rr, right_rH = factors
        return ((x_NH @ right_rH.T) @ left_Rr.T).float()

    def multiply_back(self, h_NR: Tensor, first_column: int, hidden: int) -> Tensor:
        factors = self._factors(first_column, hidden)
        if factors is None:
            return super().multiply_back(h_NR, first_column, hidden)
        left_Rr, right_rH = factors
        return ((h_NR @ left_Rr) @ right_rH).float()

    def _factors(self, first_column: int, count: int) -> tuple[Tensor, Tensor] | None:
        """left [R, r] and right [r, C] of consecutive columns, if they are all of one block."""
        blocks = len(self.right)
        width = self.columns // blocks
        j, offset = divmod(first_column, width) if width else (blocks, 0)
        if j >= blocks or offset + count > width:
            return None
        return self.left[:, j], self.right[j, :, offset : offset + count]


def split_blocks(matrix_ID: Tensor, blocks: int) -> list[Tensor]:
    """The blocks of a matrix, each [I, W]: F columns, one of the last D mod b, or else a zero."""
    rows, columns = matrix_ID.shape
    plain, extra = divmod(columns, blocks)
    found = matrix_ID.new_zeros(blocks, rows, plain + (1 if extra else 0))
    for j in range(blocks):
        found[j, :, :plain] = matrix_ID[:, j * plain : (j + 1) * plain]
        if j < extra:
            found[j, :, plain] = matrix_ID[:, blocks * plain + j]
    return list(found)


def join_blocks(blocks: Sequence[Tensor], columns: int) -> Tensor:
    """The matrix [I, D] of these blocks: the inverse of `split_blocks`."""
    plain, extra = divmod(columns, len(blocks))
    parts = [block_IW[:, :plain] for block_IW in blocks]
    return torch.cat(parts + [block_IW[:, plain:] for block_IW in blocks[:extra]], dim=1)
