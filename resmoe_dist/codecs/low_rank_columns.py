"""`low_rank_columns`: weight matrices as a product of low rank plus a few whole columns.

Paper 002 (MC-SMoE), section 3.2: W = U·V + S, where S keeps the columns of W − U·V with the largest
scores. Each projection is decomposed by itself: block j of the design matrix is projection j with
its row bias, as in `low_rank_blocks`. The columns of the input projections are hidden dimensions,
the same for all rows. The columns of the output projection are neurons: rows of downᵀ.

`left`, `column_values` and the kept rows of downᵀ are sharded with the rows; `right` and the
numbers of the kept columns are shared by all rows.

Legend: I rows, R rows held here, D columns, b blocks, F = ⌊D/b⌋ columns of a block without its
bias, W = ⌈D/b⌉ with it, r rank, K kept columns of an input projection, V kept rows of downᵀ, N
copies, H hidden, C columns of a part.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor
from typing_extensions import Self

from resmoe_dist.codecs.base import CodecConfig, EncodedMatrix, StoredTensor, TensorReader
from resmoe_dist.codecs.low_rank_blocks import LowRankBlocksMatrix, join_blocks, split_blocks
from resmoe_dist.codecs.moments import Moments
from resmoe_dist.codecs.pruned import row_offsets_of
from resmoe_dist.codecs.registry import register_codec
from resmoe_dist.codecs.svd import low_rank_factors

# Of a kept column's number, and of a row's offset.
_INDEX_BYTES = 4


class SharesConfig(BaseModel):
    """share: of a matrix's entries that are stored. sparse: the part of it in whole columns."""

    share: float = Field(default=0.5, gt=0, le=1, description="share of the entries stored")
    sparse: float = Field(default=0.1, ge=0, lt=1, description="share of the columns kept in S")

    @model_validator(mode="after")
    def _leave_something_to_the_factors(self) -> Self:
        if self.sparse >= self.share:
            raise ValueError(f"sparse {self.sparse:g} must be below share {self.share:g}")
        return self


class LowRankColumnsConfig(SharesConfig, CodecConfig):
    """blocks: of columns, one per projection."""

    blocks: int = Field(default=3, ge=2, description="blocks of columns: 3 gated, 2 two-layer")

    def for_blocks(self, blocks: int) -> Self:
        return self.model_copy(update={"blocks": blocks})

    def kept_columns(self, columns: int) -> int:
        """K for a matrix with D = `columns`."""
        return int(self.sparse * -(-columns // self.blocks))

    def kept_rows(self, rows: int) -> int:
        """V for a matrix with I = `rows`."""
        return int(self.sparse * rows)

    def rank_of(self, rows: int, columns: int) -> int:
        """The rank of each block: what the kept columns leave of the share, at least 1."""
        width = -(-columns // self.blocks)
        rank = int((self.share - self.sparse) * rows * columns / (self.blocks * (rows + width)))
        return min(max(rank, 1), rows, width)


@register_codec
class LowRankColumnsMatrix(EncodedMatrix):
    """Block j is left[:, j] [R, r] · right[j] [r, W], plus S.

    S of input block j is column_values[:, j] [R, K] in the columns kept_columns[j]. S of the output
    block is row_values [V, F]: row i has row_offsets[i+1] − row_offsets[i] of these, 0 or 1.
    """

    name = "low_rank_columns"
    config = LowRankColumnsConfig
    stored = {
        "left": StoredTensor("values"),
        "right": StoredTensor("values", per_row=False),
        "kept_columns": StoredTensor("indices", per_row=False, dtypes=(torch.int32,)),
        "column_values": StoredTensor("values"),
        "row_offsets": StoredTensor("indices", dtypes=(torch.int32,)),
        "row_values": StoredTensor("values"),
    }

    left: Tensor
    right: Tensor
    kept_columns: Tensor
    column_values: Tensor
    row_offsets: Tensor
    row_values: Tensor

    @classmethod
    def encode(
        cls,
        matrix_ID: Tensor,
        config: Any,
        dtype: torch.dtype,
        mask_ID: Tensor | None = None,
        moments: Moments | None = None,
    ) -> LowRankColumnsMatrix:
        return cls.fit(matrix_ID, config, dtype)

    @classmethod
    def fit(
        cls,
        matrix_ID: Tensor,
        config: LowRankColumnsConfig,
        dtype: torch.dtype,
        weight_ID: Tensor | None = None,
    ) -> LowRankColumnsMatrix:
        """Encode a float32 matrix.

        weight_ID: the score of an entry of S is its magnitude times this; None scores by magnitude.
        """
        rows, columns = matrix_ID.shape
        rank = config.rank_of(rows, columns)
        factors = [
            low_rank_factors(block_IW, rank)
            for block_IW in split_blocks(matrix_ID.float(), config.blocks)
        ]
        low_rank = LowRankBlocksMatrix.of_factors(factors, columns, dtype)
        # What the rounded factors leave.
        rest_ID = matrix_ID.float() - low_rank.decode().float()
        score_ID = rest_ID.abs() if weight_ID is None else rest_ID.abs() * weight_ID
        *rest, rest_out_IW = split_blocks(rest_ID, config.blocks)
        *scores, score_out_IW = split_blocks(score_ID, config.blocks)
        kept = [_largest(score_IW.sum(0), config.kept_columns(columns)) for score_IW in scores]
        values = [block_IW[:, kept_K] for block_IW, kept_K in zip(rest, kept, strict=True)]
        kept_V = _largest(score_out_IW.sum(1), config.kept_rows(rows))
        is_kept_I = torch.zeros(rows, dtype=torch.int64, device=matrix_ID.device)
        is_kept_I[kept_V] = 1
        tensors = {
            **low_rank.tensors(),
            "kept_columns": torch.stack(kept).int(),
            "column_values": torch.stack(values, dim=1).to(dtype),
            "row_offsets": row_offsets_of(is_kept_I),
            "row_values": rest_out_IW[kept_V, : columns // config.blocks].to(dtype),
        }
        return cls((rows, columns), tensors, dtype)

    @classmethod
    def read(
        cls, read: TensorReader, columns: int, start: int, stop: int, dtype: torch.dtype
    ) -> LowRankColumnsMatrix:
        row_offsets = read("row_offsets", start, stop + 1)
        first, last = int(row_offsets[0]), int(row_offsets[-1])
        tensors = {
            name: read(name, start, stop) if tensor.per_row else read(name, 0, None)
            for name, tensor in cls.stored.items()
            if not name.startswith("row_")
        }
        # Checks the factors too.
        factors = LowRankBlocksMatrix.read(
            lambda name, *_: tensors[name], columns, start, stop, dtype
        )
        blocks = len(factors.right)
        row_values = read("row_values", first, last)
        tensors |= {"row_offsets": row_offsets - first, "row_values": row_values}
        if not ((row_offsets.diff() == 0) | (row_offsets.diff() == 1)).all():
            raise ValueError("a row of the output projection is stored more than once")
        if row_values.shape != (last - first, columns // blocks):
            raise ValueError(f"rows of shape {list(row_values.shape)} for {last - first} kept ones")
        kept = tensors["kept_columns"]
        if kept.dim() != 2 or len(kept) != blocks - 1:
            raise ValueError(f"kept columns of shape {list(kept.shape)} for {blocks} blocks")
        if tensors["column_values"].shape[1:] != kept.shape:
            raise ValueError("the kept columns and their values disagree")
        width = -(-columns // blocks)
        if kept.numel() and (
            int(kept.min()) < 0 or int(kept.max()) >= width or not (kept.diff() > 0).all()
        ):
            raise ValueError(f"the kept columns are not ascending numbers below {width}")
        return cls((stop - start, columns), tensors, dtype)

    @classmethod
    def shapes(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        return LowRankBlocksMatrix.shapes(rows, columns) | {
            "kept_columns": (None, None),
            "column_values": (rows, None, None),
            "row_offsets": (rows + 1,),
            "row_values": (None, None),
        }

    @classmethod
    def stored_bytes(
        cls, rows: int, columns: int, config: LowRankColumnsConfig, itemsize: int
    ) -> int:
        return cls.sliced_bytes(rows, columns, rows, config, itemsize)

    @classmethod
    def sliced_bytes(
        cls, rows: int, columns: int, held: int, config: LowRankColumnsConfig, itemsize: int
    ) -> int:
        blocks, width = config.blocks, -(-columns // config.blocks)
        factors = blocks * config.rank_of(rows, columns) * (held + width)
        kept = (blocks - 1) * config.kept_columns(columns)
        row_values = -(-config.kept_rows(rows) * (columns // blocks) * held // rows)
        indices = _INDEX_BYTES * (kept + held + 1)
        return (factors + kept * held + row_values) * itemsize + indices

    def slice_rows(self, start: int, stop: int) -> LowRankColumnsMatrix:
        first, last = int(self.row_offsets[start]), int(self.row_offsets[stop])
        tensors = self.tensors() | {
            "left": self.left[start:stop],
            "column_values": self.column_values[start:stop],
            "row_offsets": self.row_offsets[start : stop + 1] - first,
            "row_values": self.row_values[first:last],
        }
        return LowRankColumnsMatrix((stop - start, self.columns), tensors, self.dtype)

    def decode(self) -> Tensor:
        return self._low_rank.decode() + self._sparse

    def multiply(self, x_NH: Tensor, first_column: int) -> Tensor:
        product_NR = self._low_rank.multiply(x_NH, first_column)
        block = self._input_block(first_column, x_NH.shape[1])
        if block is None:
            sparse_RC = self._sparse[:, first_column : first_column + x_NH.shape[1]]
            return product_NR + x_NH.float() @ sparse_RC.float().T
        # The last column of a block may be a bias, which is not multiplied.
        within_K = self.kept_columns[block] < x_NH.shape[1]
        x_NK = x_NH[:, self.kept_columns[block][within_K]]
        return product_NR + x_NK.float() @ self.column_values[:, block, within_K].float().T

    def multiply_back(self, h_NR: Tensor, first_column: int, hidden: int) -> Tensor:
        product_NH = self._low_rank.multiply_back(h_NR, first_column, hidden)
        width = self.columns // len(self.right)
        if (first_column, hidden) != ((len(self.right) - 1) * width, width):
            sparse_RC = self._sparse[:, first_column : first_column + hidden]
            return product_NH + h_NR.float() @ sparse_RC.float()
        return product_NH + h_NR[:, self._kept_rows].float() @ self.row_values.float()

    @property
    def _low_rank(self) -> LowRankBlocksMatrix:
        """U·V of all blocks."""
        factors = {"left": self.left, "right": self.right}
        return LowRankBlocksMatrix((self.rows, self.columns), factors, self.dtype)

    @property
    def _sparse(self) -> Tensor:
        """S [R, D]."""
        blocks = len(self.right)
        plain, width = self.columns // blocks, self.right.shape[2]
        found = self.left.new_zeros(blocks, self.rows, width)
        for j, kept_K in enumerate(self.kept_columns):
            found[j][:, kept_K] = self.column_values[:, j]
        found[-1, self._kept_rows, :plain] = self.row_values
        return join_blocks(list(found), self.columns)

    @property
    def _kept_rows(self) -> Tensor:
        """Numbers [V] of the rows of downᵀ that S keeps."""
        return self.row_offsets.diff().nonzero().squeeze(1)

    def _input_block(self, first_column: int, count: int) -> int | None:
        """The input projection whose weights are these columns, if it is one."""
        block, offset = divmod(first_column, self.columns // len(self.right))
        whole = offset == 0 and count == self.columns // len(self.right)
        return block if whole and block < len(self.kept_columns) else None


def _largest(scores: Tensor, count: int) -> Tensor:
    """The numbers of the `count` largest scores, ascending."""
    return scores.topk(count).indices.sort().values
