"""`empty`: a residual of zero, which takes no bytes. The expert is its centre.

For methods that merge experts: several experts of the model are then one stored matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resmoe_dist.codecs.base import EncodedMatrix
from resmoe_dist.codecs.moments import Moments
from resmoe_dist.codecs.registry import register_codec


@register_codec
class EmptyMatrix(EncodedMatrix):
    """Zeros [R, D]."""

    name = "empty"

    @classmethod
    def encode(
        cls,
        matrix_ID: Tensor,
        config: Any,
        dtype: torch.dtype,
        mask_ID: Tensor | None = None,
        moments: Moments | None = None,
    ) -> EmptyMatrix:
        rows, columns = matrix_ID.shape
        return cls((rows, columns), {}, dtype)

    @classmethod
    def shapes(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        return {}

    @classmethod
    def stored_bytes(cls, rows: int, columns: int, config: Any, itemsize: int) -> int:
        return 0

    def decode(self) -> Tensor:
        return self._like.new_zeros(self.rows, self.columns)

    def add_to(self, dense_RC: Tensor, first_column: int = 0) -> None:
        pass

    def multiply(self, x_NH: Tensor, first_column: int) -> Tensor:
        return x_NH.new_zeros(len(x_NH), self.rows, dtype=torch.float32)

    def multiply_back(self, h_NR: Tensor, first_column: int, hidden: int) -> Tensor:
        return h_NR.new_zeros(len(h_NR), hidden, dtype=torch.float32)
