"""A token and its routing as one row of bytes, so that they travel in one message.

A row is [index (K int32) | weights (K float32) | token (H)], padded to whole words, so that each
part can be read where it is.

Legend: T tokens, R rows, K experts per token, H hidden, B bytes of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resmoe_dist.routing import NO_EXPERT

_ROUTING_BYTES = 8


class RoutedRows(NamedTuple):
    """Tokens with their routing: x_RH, index_RK (int32), weights_RK (float32)."""

    x_RH: Tensor
    index_RK: Tensor
    weights_RK: Tensor


def pack(x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, rows: int | None = None) -> Tensor:
    """One message row per token: [R, B] in uint8. A row of zeros is a token without experts.

    rows: R, at least T; rows beyond the tokens are zeros. None: T.
    """
    (T, H), K = x_TH.shape, index_TK.shape[1]
    word = max(x_TH.element_size(), 4)
    size = K * _ROUTING_BYTES + -(-H * x_TH.element_size() // word) * word
    rows_RB = torch.zeros(T if rows is None else rows, size, dtype=torch.uint8, device=x_TH.device)
    parts = _parts(rows_RB[:T], H, x_TH.dtype, K)
    parts.x_RH.copy_(x_TH)
    parts.index_RK.copy_(index_TK).sub_(NO_EXPERT)
    parts.weights_RK.copy_(weights_TK)
    return rows_RB


def unpack(rows_RB: Tensor, hidden: int, dtype: torch.dtype, top_k: int) -> RoutedRows:
    """The inverse of `pack`. hidden, dtype: of the tokens. Tokens and weights are not copied."""
    parts = _parts(rows_RB, hidden, dtype, top_k)
    return parts._replace(index_RK=parts.index_RK + NO_EXPERT)


def _parts(rows_RB: Tensor, hidden: int, dtype: torch.dtype, top_k: int) -> RoutedRows:
    """Views of the rows' parts. The index is stored plus one."""
    first = top_k * _ROUTING_BYTES // dtype.itemsize
    return RoutedRows(
        rows_RB.view(dtype)[:, first : first + hidden],
        rows_RB.view(torch.int32)[:, :top_k],
        rows_RB.view(torch.float32)[:, top_k : 2 * top_k],
    )
