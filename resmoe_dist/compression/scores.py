"""Scores of row pairs: s_ij = ⟨target_i, expert_j⟩, computed in blocks.

Legend: I rows of the target and of the expert, D columns, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from resmoe_dist.compression.scaling import power_of_two_scale
from resmoe_dist.design_matrix import row_ranges


def score_blocks(
    target_ID: Tensor, expert_ID: Tensor, block_rows: int
) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of `block_rows` expert rows, with the scores of all target rows, float32 [I, B].

    The target's device computes them. Scores are divided by the expert's `power_of_two_scale`.
    """
    scale = power_of_two_scale(expert_ID)
    for rows in row_ranges(len(expert_ID), block_rows):
        expert_BD = expert_ID[rows].to(target_ID.device, torch.float32) / scale
        yield rows, target_ID @ expert_BD.T


def is_permutation(partner_I: Tensor) -> bool:
    """Whether each row is the partner of exactly one row."""
    return torch.equal(partner_I.sort().values, torch.arange(len(partner_I)))
