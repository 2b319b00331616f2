"""A token and its routing as one row of bytes, so that they travel in one message.

Legend: R rows, K experts per token, H hidden, B bytes of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resmoe_dist.routing import NO_EXPERT


class RoutedRows(NamedTuple):
    """Tokens with their routing: x_RH, index_RK (int32), weights_RK (float32)."""

    x_RH: Tensor
    index_RK: Tensor
    weights_RK: Tensor


def pack(x_RH: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """One message row per token: [R, B] in uint8. A row of zeros is a token without experts."""
    # Not `contiguous()`: for torch, [0, 1] with stride 0 is contiguous, but has no view as bytes.
    index_RK, weights_RK = (
        part.clone(memory_format=torch.contiguous_format)
        for part in (index_RK.int() - NO_EXPERT, weights_RK.float())
    )
    parts = (x_RH.contiguous(), index_RK, weights_RK)
    return torch.cat([part.view(torch.uint8) for part in parts], 1)


def unpack(rows_RB: Tensor, hidden: int, dtype: torch.dtype, top_k: int) -> RoutedRows:
    """The inverse of `pack`. hidden, dtype: of the tokens."""
    routing_bytes = 4 * top_k
    widths = (hidden * dtype.itemsize, routing_bytes, routing_bytes)
    # Copies: a slice of bytes may begin where its numbers must not.
    x_RH, index_RK, weights_RK = (
        part.clone(memory_format=torch.contiguous_format) for part in rows_RB.split(widths, 1)
    )
    return RoutedRows(
        x_RH.view(dtype), index_RK.view(torch.int32) + NO_EXPERT, weights_RK.view(torch.float32)
    )
