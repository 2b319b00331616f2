"""`dense`: the matrix itself. The default for centres, and for layers that are not compressed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resmoe_dist.codecs.base import EncodedMatrix, StoredTensor
from resmoe_dist.codecs.moments import Moments
from resmoe_dist.codecs.registry import CodecSpec, register_codec


@register_codec
class DenseMatrix(EncodedMatrix):
    """weight [R, D]."""

    name = "dense"
    stored = {"weight": StoredTensor("values")}
    is_dense = True

    weight: Tensor

    @classmethod
    def of(cls, weight_RD: Tensor) -> DenseMatrix:
        """A dense matrix that shares memory with `weight_RD`."""
        rows, columns = weight_RD.shape
        return cls((rows, columns), {"weight": weight_RD}, weight_RD.dtype)

    @classmethod
    def encode(
        cls,
        matrix_ID: Tensor,
        config: Any,
        dtype: torch.dtype,
        mask_ID: Tensor | None = None,
        moments: Moments | None = None,
    ) -> DenseMatrix:
        return cls.of(matrix_ID.to(dtype))

    @classmethod
    def shapes(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        return {"weight": (rows, columns)}

    @classmethod
    def stored_bytes(cls, rows: int, columns: int, config: Any, itemsize: int) -> int:
        return rows * columns * itemsize

    def decode(self) -> Tensor:
        """The stored weight, not a copy."""
        return self.weight


# The default for centres.
DENSE = CodecSpec(name="dense")
