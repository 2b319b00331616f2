"""Row permutations of a group's experts.

Legend: E experts of the group, I rows, D columns, B rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Matrix entries of one block of permuted rows.
BLOCK_ENTRIES = 1 << 22


def identity_permutations(experts_EID: Tensor) -> Tensor:
    """The permutations [E, I] that leave all rows in stored order."""
    count, rows, _ = experts_EID.shape
    return torch.arange(rows).repeat(count, 1)


def permute_rows(experts_EID: Tensor, permutations_EI: Tensor) -> Tensor:
    """Permuted copies [E, I, D]: expert k becomes experts_EID[k, permutations_EI[k]]."""
    return torch.stack(
        [expert[perm] for expert, perm in zip(experts_EID, permutations_EI, strict=True)]
    )


def add_permuted_rows(total_ID: Tensor, expert_ID: Tensor, perm_I: Tensor, factor: float) -> None:
    """total += factor · expert[perm], in place, without a permuted copy of the whole expert."""
    step = max(1, BLOCK_ENTRIES // expert_ID.shape[1])
    for total_BD, rows_B in zip(total_ID.split(step), perm_I.split(step), strict=True):
        total_BD.add_(expert_ID[rows_B].float(), alpha=factor)
