"""Which entries of the residuals are kept, for codecs that select entries.

Legend: E experts of the group, I rows, D columns, B rows of a block, S sampled entries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from resmoe_dist.compression.blocks import AlignedExperts
from resmoe_dist.compression.selection import OrderStatistic, order_statistic
from resmoe_dist.compression.stages import stage

# Consecutive entries of a row that share one budget in a balanced mask.
BALANCED_RUN = 64


def residual_rows(expert_BD: Tensor, center_ID: Tensor | None, rows: slice) -> Tensor:
    """Rows of an expert minus those of the centre.

    center_ID: as stored, so that residuals make up for its rounding. None counts as zero.
    """
    return expert_BD if center_ID is None else expert_BD - center_ID[rows].to(expert_BD)


def weighted_magnitude(aligned: AlignedExperts, residual_BD: Tensor, rows: slice) -> Tensor:
    """|residual| times the entries' weights, in units of `aligned.scale`."""
    scaled_BD = residual_BD / aligned.scale
    weight_BD = aligned.block_weights(rows)
    return (scaled_BD if weight_BD is None else scaled_BD * weight_BD).abs()


def expert_blocks(aligned: AlignedExperts, experts: list[int]) -> Iterator[tuple[int, slice]]:
    """Blocks of rows of one expert after the other: (expert, rows)."""
    return ((k, rows) for k in experts for rows in aligned.blocks(1))


@stage("threshold")
def last_dropped_magnitude(
    aligned: AlignedExperts, center_ID: Tensor | None, experts: list[int], keep: float
) -> OrderStatistic:
    """The weighted magnitude above which the ⌊keep·n⌋ largest residual entries of `experts` are.

    Its ties count, for each block of `expert_blocks`, the entries of exactly that magnitude that
    are dropped. The magnitude is zero if only zeros need to be dropped; zeros are never kept.
    """

    def magnitudes(block: tuple[int, slice]) -> Tensor:
        k, rows = block
        residual_BD = residual_rows(aligned.expert_rows(k, rows), center_ID, rows)
        return weighted_magnitude(aligned, residual_BD, rows).flatten()

    total = len(experts) * aligned.entries
    drops = total - int(keep * total)
    if not drops:
        return OrderStatistic(0.0, [])
    sample_ES = aligned.sample[experts]
    if center_ID is not None:
        sample_ES = sample_ES - aligned.sample_of(center_ID)
    if aligned.sample_weights is not None:
        sample_ES = sample_ES * aligned.sample_weights
    return order_statistic(
        sample_ES.abs(),
        magnitudes,
        lambda: expert_blocks(aligned, experts),
        total,
        drops,
        device=aligned.device,
    )


def keep_mask(magnitude_BD: Tensor, threshold: float, dropped_ties: int) -> Tensor:
    """Entries above the threshold, and those equal to it after the first `dropped_ties`."""
    mask_BD = magnitude_BD > threshold
    ties_BD = magnitude_BD == threshold
    if int(ties_BD.sum()) > dropped_ties:
        mask_BD |= ties_BD & (ties_BD.flatten().cumsum(0) > dropped_ties).view_as(ties_BD)
    return mask_BD


def balanced_mask(magnitude_BD: Tensor, keep: float) -> Tensor:
    """The ⌊keep·run⌋ largest entries of every run of BALANCED_RUN entries of a row.

    Every full run has equally many entries, zeros included if need be.
    """
    mask_BD = torch.zeros_like(magnitude_BD, dtype=torch.bool)
    for first in range(0, magnitude_BD.shape[1], BALANCED_RUN):
        run_BR = magnitude_BD[:, first : first + BALANCED_RUN]
        count = int(keep * run_BR.shape[1])
        largest = run_BR.topk(count, sorted=False).indices
        mask_BD[:, first : first + BALANCED_RUN].scatter_(1, largest, True)
    return mask_BD
