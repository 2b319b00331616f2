"""`low_rank`: the residual of the design matrix by its leading singular vectors.

Paper 001, appendix A.4 (SVD on the concatenated matrix). One factor has a row per neuron and is
sharded with them; the other is shared by all rows, so every TP rank holds it whole.

Legend: I rows, R rows held here, D columns, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_dist.codecs.base import EncodedResidual, TensorReader

# Up to this many rows or columns the exact SVD takes seconds; past it, a randomised one
# (Halko, Martinsson and Tropp 2011) with power iterations and oversampling.
_EXACT_SVD_LIMIT = 2048
_POWER_ITERATIONS = 4
_OVERSAMPLING = 16


def rank_for(rows: int, columns: int, keep: float) -> int:
    """The rank whose two factors hold `keep` of the entries: keep·I·D / (I + D), at least 1.

    Never above min(I, D), where the factorisation is exact.
    """
    rank = int(keep * rows * columns / (rows + columns))
    return min(max(rank, 1), rows, columns)


class LowRankResidual(EncodedResidual):
    """left [R, r] · right [r, D]."""

    name = "low_rank"

    left: Tensor
    right: Tensor

    @classmethod
    def encode(
        cls, residual_ID: Tensor, *, keep: float, dtype: torch.dtype, mask_ID: Tensor | None = None
    ) -> LowRankResidual:
        rows, columns = residual_ID.shape
        # keep = 1 asks for the residual itself, which I·D/(I+D) singular vectors do not give.
        rank = min(rows, columns) if keep >= 1 else rank_for(rows, columns, keep)
        matrix_ID = residual_ID.float()
        if min(rows, columns) <= _EXACT_SVD_LIMIT:
            U, S, Vh = torch.linalg.svd(matrix_ID, full_matrices=False)
        else:
            width = min(rank + _OVERSAMPLING, rows, columns)
            # The caller's random state is left alone, and the same input gives the same bytes.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                U, S, V = torch.svd_lowrank(matrix_ID, q=width, niter=_POWER_ITERATIONS)
            Vh = V.T
        scale_r = S[:rank].sqrt()
        left = (U[:, :rank] * scale_r).to(dtype).contiguous()
        right = (scale_r.unsqueeze(1) * Vh[:rank]).to(dtype).contiguous()
        return cls(columns, {"left": left, "right": right})

    @classmethod
    def read(cls, read: TensorReader, columns: int, start: int, stop: int) -> LowRankResidual:
        left, right = read("left", start, stop), read("right", 0, None)
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"factors of rank {left.shape[1]} and {right.shape[0]}")
        return cls(columns, {"left": left, "right": right})

    @classmethod
    def expected_tensors(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        return {"left": (rows, None), "right": (None, columns)}

    @property
    def rows(self) -> int:
        return self.left.shape[0]

    def decode(self) -> Tensor:
        return self.left @ self.right

    def add_to(self, dense_RD: Tensor) -> None:
        dense_RD.addmm_(self.left, self.right)

    def slice_rows(self, start: int, stop: int) -> LowRankResidual:
        return LowRankResidual(self.columns, {"left": self.left[start:stop], "right": self.right})
