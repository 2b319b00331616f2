"""What encoding an expert lost.

Legend: I rows, D columns, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resmoe_dist.codecs import EncodedMatrix
from resmoe_dist.compression.blocks import AlignedExperts


@dataclass(frozen=True)
class Loss:
    """The errors of one expert, or of some of its rows.

    squared_error: ‖T_k W_k − restored_k‖². squared_norm: ‖W_k‖². weighted_*: the same with the
    weights of the entries; without weights, equal to the unweighted ones. kept: entries of the
    residual that the codec kept.
    """

    squared_error: float
    squared_norm: float
    weighted_squared_error: float
    weighted_squared_norm: float
    kept: int


def measure_loss(
    aligned: AlignedExperts,
    expert_BD: Tensor,
    residual_BD: Tensor,
    encoded: EncodedMatrix,
    rows: slice,
    kept: int,
) -> Loss:
    """The loss of some rows of an expert whose exact residual was encoded as `encoded`."""
    return _loss(aligned, expert_BD, residual_BD - encoded.decode().float(), rows, kept)


def loss_against(
    aligned: AlignedExperts, expert: int, restored_ID: Tensor | None, kept: int
) -> Loss:
    """The loss of a whole expert, in aligned order, that is restored as `restored_ID`.

    None: the expert is dropped, so all of it is lost.
    """
    every_row = slice(None)
    expert_ID = aligned.expert_rows(expert, every_row)
    lost_ID = expert_ID if restored_ID is None else expert_ID - restored_ID.to(expert_ID)
    return _loss(aligned, expert_ID, lost_ID, every_row, kept)


def _loss(
    aligned: AlignedExperts, expert_BD: Tensor, lost_BD: Tensor, rows: slice, kept: int
) -> Loss:
    unweighted = _squared_norm(lost_BD), _squared_norm(expert_BD)
    weight_BD = aligned.block_weights(rows)
    if weight_BD is None:
        return Loss(*unweighted, *unweighted, kept)
    weighted = _squared_norm(lost_BD * weight_BD), _squared_norm(expert_BD * weight_BD)
    return Loss(*unweighted, *weighted, kept)


def sum_losses(parts: Sequence[Loss]) -> Loss:
    """The loss of an expert from those of its blocks of rows."""
    return Loss(
        squared_error=sum(part.squared_error for part in parts),
        squared_norm=sum(part.squared_norm for part in parts),
        weighted_squared_error=sum(part.weighted_squared_error for part in parts),
        weighted_squared_norm=sum(part.weighted_squared_norm for part in parts),
        kept=sum(part.kept for part in parts),
    )


def _squared_norm(matrix_BD: Tensor) -> float:
    """‖·‖², in float64: squares of very large weights overflow float32."""
    return float(torch.linalg.vector_norm(matrix_BD, dtype=torch.float64)) ** 2
