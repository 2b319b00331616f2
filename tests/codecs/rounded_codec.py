"""A codec that only tests know: a byte per entry and a scale per row.

Importing the module registers the codec. It shows that one file makes a codec: compress, verify,
inspect, restore and serving take it as a centre and as a residual.

Legend: I rows, R rows held here, D columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resmoe_dist.codecs import EncodedMatrix, Moments, StoredTensor, register_codec

_LARGEST = 127


@register_codec
class RoundedMatrix(EncodedMatrix):
    """values [R, D] (int8) times scales [R] (float32)."""

    name = "rounded"
    stored = {
        "values": StoredTensor("values", dtypes=(torch.int8,)),
        "scales": StoredTensor("scales", dtypes=(torch.float32,)),
    }

    values: Tensor
    scales: Tensor

    @classmethod
    def encode(
        cls,
        matrix_ID: Tensor,
        config: Any,
        dtype: torch.dtype,
        mask_ID: Tensor | None = None,
        moments: Moments | None = None,
    ) -> RoundedMatrix:
        scale_I = matrix_ID.abs().amax(1) / _LARGEST
        steps_ID = matrix_ID / scale_I.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
        tensors = {"values": steps_ID.round().to(torch.int8), "scales": scale_I.float()}
        rows, columns = matrix_ID.shape
        return cls((rows, columns), tensors, dtype)

    @classmethod
    def shapes(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        return {"values": (rows, columns), "scales": (rows,)}

    @classmethod
    def stored_bytes(cls, rows: int, columns: int, config: Any, itemsize: int) -> int:
        return rows * columns + 4 * rows

    def decode(self) -> Tensor:
        return (self.values * self.scales.unsqueeze(1)).to(self.dtype)
