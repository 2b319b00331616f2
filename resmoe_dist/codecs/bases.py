"""`bases`: matrices that the experts of a group share, for residuals that are made of them.

MoBE's basis matrices (arXiv:2508.05257). Stored in the place of a centre: once per group, whole on
every tensor-parallel rank. Unlike a centre they are not added to the residuals: the codec decodes
to zeros, and codec `mobe` reads its centre's bases. Only the method `mobe` makes them.

Legend: R rows held here, D columns, p input projections, m bases, r rank, W columns of a block of
the design matrix (see `low_rank_blocks`), N copies, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from resmoe_dist.codecs.base import BudgetConfig, StoredTensor, TensorReader
from resmoe_dist.codecs.empty import EmptyMatrix
from resmoe_dist.codecs.moments import Moments
from resmoe_dist.codecs.registry import register_codec


class BasesConfig(BudgetConfig):
    """keep: share of an expert's entries that its own matrices hold, which decides the rank."""

    bases: int = Field(default=4, ge=1, description="matrices shared by the experts of a group")
    blocks: int = Field(default=3, ge=2, description="blocks of columns: 3 gated, 2 two-layer")

    def rank_of(self, rows: int, columns: int) -> int:
        """The rank that the output projection, stored whole, leaves of `keep`; at least 1."""
        output = columns // self.blocks
        rank = int((self.keep * columns - output) / (self.blocks - 1))
        return min(max(rank, 1), rows, -(-columns // self.blocks))


@register_codec
class BasesMatrix(EmptyMatrix):
    """bases [p, m, r, W]; zeros [R, D] as a matrix."""

    name = "bases"
    config = BasesConfig
    stored = {"bases": StoredTensor("values", per_row=False)}
    standalone = False

    bases: Tensor

    @classmethod
    def of(cls, bases_pmrW: Tensor, rows: int, columns: int, dtype: torch.dtype) -> BasesMatrix:
        """The bases of a group whose experts are matrices [rows, columns]."""
        return cls((rows, columns), {"bases": bases_pmrW.to(dtype).contiguous()}, dtype)

    @classmethod
    def encode(
        cls,
        matrix_ID: Tensor,
        config: Any,
        dtype: torch.dtype,
        mask_ID: Tensor | None = None,
        moments: Moments | None = None,
    ) -> BasesMatrix:
        raise NotImplementedError("bases are fitted to a whole group")

    @classmethod
    def read(
        cls, read: TensorReader, columns: int, start: int, stop: int, dtype: torch.dtype
    ) -> BasesMatrix:
        found = super().read(read, columns, start, stop, dtype)
        shape = list(found.bases.shape)
        if len(shape) != 4 or 0 in shape or shape[3] != -(-columns // (shape[0] + 1)):
            raise ValueError(f"bases of shape {shape} for {columns} columns")
        return found

    @classmethod
    def shapes(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        return {"bases": (None, None, None, None)}

    @classmethod
    def stored_bytes(cls, rows: int, columns: int, config: BasesConfig, itemsize: int) -> int:
        width = -(-columns // config.blocks)
        per_rank = (config.blocks - 1) * config.bases * width
        return config.rank_of(rows, columns) * per_rank * itemsize
