"""The codec that compresses nothing: a whole expert, no centre.

For layers left out by `--layers`, so that they are sharded and served like all the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_dist.codecs.base import EncodedResidual, TensorReader


class DenseResidual(EncodedResidual):
    """weight [R, D]: the rows themselves."""

    name = "dense"
    uses_center = False

    weight: Tensor

    @classmethod
    def encode(
        cls, residual_ID: Tensor, *, keep: float, dtype: torch.dtype, mask_ID: Tensor | None = None
    ) -> DenseResidual:
        return cls(residual_ID.shape[1], {"weight": residual_ID.to(dtype)})

    @classmethod
    def read(cls, read: TensorReader, columns: int, start: int, stop: int) -> DenseResidual:
        return cls(columns, {"weight": read("weight", start, stop)})

    @classmethod
    def expected_tensors(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        return {"weight": (rows, columns)}

    @classmethod
    def stored_bytes(cls, rows: int, columns: int, keep: float, itemsize: int) -> int:
        return rows * columns * itemsize

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    def decode(self) -> Tensor:
        return self.weight

    def slice_rows(self, start: int, stop: int) -> DenseResidual:
        return DenseResidual(self.columns, {"weight": self.weight[start:stop]})
