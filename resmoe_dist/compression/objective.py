"""The objective of row alignment (paper 001, equation 4), and how one permutation changes it.

    (1/E) Σ_k ‖T_k W_k − C‖², C the mean of the aligned experts T_k W_k

Legend: E experts of the group, I rows, D columns, B rows of a block, S sampled rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_dist.compression.permutations import BLOCK_ENTRIES, permute_rows
from resmoe_dist.compression.scaling import power_of_two_scale

_SAMPLED_ROWS = 256


def alignment_objective(
    experts_EID: Tensor, permutations_EI: Tensor, *, block_entries: int = BLOCK_ENTRIES
) -> float:
    """(1/E) Σ_k ‖W_k[perm_k] − C‖², C their mean.

    block_entries: entries, over all experts, of the blocks of rows that are processed at a time.
    """
    count, _, columns = experts_EID.shape
    # Without scaling, squares of very large or small weights do not fit in float32.
    scale = power_of_two_scale(experts_EID)
    step = max(1, block_entries // (count * columns))
    total = 0.0
    for perm_EB in permutations_EI.split(step, dim=1):
        block_EBD = permute_rows(experts_EID, perm_EB).float() / scale
        # Subtracting the first expert keeps the mean small: its rounding would add to the result.
        block_EBD -= block_EBD[0].clone()
        block_EBD -= block_EBD.mean(0)
        total += float(block_EBD.square_().sum(-1).double().sum())
    return total / count * scale * scale


def gain(
    target_ID: Tensor,
    expert_ID: Tensor,
    old_I: Tensor,
    new_I: Tensor,
    *,
    block_entries: int = BLOCK_ENTRIES,
) -> float:
    """How much a new permutation raises the score: Σ_i ⟨target_i, expert[new_i] − expert[old_i]⟩.

    block_entries: entries of the blocks of rows that are processed at a time.
    """
    step = max(1, block_entries // expert_ID.shape[1])
    total = 0.0
    for rows_B in (old_I != new_I).nonzero().squeeze(1).split(step):
        change_BD = expert_ID[new_I[rows_B]].double() - expert_ID[old_I[rows_B]]
        total += float((target_ID[rows_B] * change_BD).sum())
    return total


def gain_bound(target_ID: Tensor, expert_ID: Tensor, perm_I: Tensor) -> float:
    """Estimated upper bound of `gain` over all new permutations, old permutation `perm_I`.

    It is the gain if each row could have its best partner, even if several rows want the same one.
    Estimated from a sample of rows, at a small part of the cost of an assignment.
    """
    step = max(1, len(perm_I) // _SAMPLED_ROWS)
    # Without scaling, products of very small weights do not fit in float32.
    target_scale, expert_scale = power_of_two_scale(target_ID), power_of_two_scale(expert_ID)
    sample_SD = target_ID[::step] / target_scale
    parts = expert_ID.split(max(1, BLOCK_ENTRIES // expert_ID.shape[1]))
    score_SI = torch.cat([sample_SD @ (part_BD.float() / expert_scale).T for part_BD in parts], 1)
    current_S = score_SI.gather(1, perm_I[::step].unsqueeze(1)).squeeze(1)
    mean_gain = float((score_SI.amax(1) - current_S).double().mean())
    return mean_gain * len(perm_I) * target_scale * expert_scale
