"""An 8-bit certificate: proves that an assignment is optimal, without a solver.

If the rows' best partners are all different, they form the optimal assignment. Products of 8-bit
integers find the best partners, and prove them if each row's lead over its second-best partner is
larger than the rounding error can be.

Legend: I rows, D columns, B rows of a block, U undecided rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_dist.compression.blocks import CPU
from resmoe_dist.compression.scaling import power_of_two_scale
from resmoe_dist.compression.scores import is_permutation, score_blocks
from resmoe_dist.compression.threads import in_parallel
from resmoe_dist.design_matrix import row_ranges

_INT8_MAX = 127
# Rows that one thread rounds at a time.
_ROUNDED_ROWS = 64


def supports_int8_products(columns: int) -> bool:
    """Whether this CPU multiplies 8-bit integers faster than floats, and sums do not overflow."""
    has_instructions = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    return has_instructions and columns * _INT8_MAX**2 < 2**31


def certified_assignment(
    target_ID: Tensor, expert_ID: Tensor, *, block_rows: int, max_undecided: int
) -> Tensor | None:
    """The optimal assignment [I] if it consists of each row's best partner, else None.

    Also None if `best_partners` gives up. Parameters: of `best_partners`.
    """
    best_I = best_partners(target_ID, expert_ID, block_rows=block_rows, max_undecided=max_undecided)
    return best_I if best_I is not None and is_permutation(best_I) else None


def best_partners(
    target_ID: Tensor, expert_ID: Tensor, *, block_rows: int, max_undecided: int
) -> Tensor | None:
    """For each target row, the expert row [I] with the highest score.

    Float32 products decide the rows whose lead is too small for 8 bits. Returns None if a block of
    `block_rows` has more than `max_undecided` of them.

    The error of a score. With t = t̂ + δt and w = ŵ + δw, where t̂ and ŵ are rounded to 8 bits, the
    score ⟨t̂, ŵ⟩ is off by at most ‖δt‖·‖w‖ + ‖t̂‖·‖δw‖ (Cauchy and Schwarz).
    """
    target, expert = RoundedRows(target_ID), RoundedRows(expert_ID)
    expert_norm_I = expert.norm_I + expert.error_I
    best_I = torch.empty(len(target_ID), dtype=torch.int64)
    for rows in row_ranges(len(target_ID), block_rows):
        products_BI = torch._int_mm(target.integers_ID[rows], expert.integers_ID.T)
        score_BI = products_BI.float()
        score_BI *= expert.scale_I
        score_BI *= target.scale_I[rows].unsqueeze(1)
        score_B, best_B = score_BI.max(1)
        # From here on upper bounds of the exact scores.
        score_BI.addr_(target.error_I[rows], expert_norm_I)
        score_BI.addr_(target.norm_I[rows], expert.error_I)
        upper_B = score_BI.gather(1, best_B.unsqueeze(1)).squeeze(1)
        rival_BI = score_BI.scatter_(1, best_B.unsqueeze(1), -torch.inf)
        lower_B = 2 * score_B - upper_B
        undecided_U = (lower_B <= rival_BI.amax(1)).nonzero().squeeze(1)
        if len(undecided_U) > max_undecided:
            return None
        if len(undecided_U):
            target_UD = target_ID[rows][undecided_U]
            parts = [part for _, part in score_blocks(target_UD, expert_ID, block_rows)]
            best_B[undecided_U] = torch.cat(parts, 1).argmax(1)
        best_I[rows] = best_B
    return best_I


class RoundedRows:
    """A matrix [I, D] rounded to 8-bit integers with one scale per row.

    The matrix is divided by its `power_of_two_scale` first. integers_ID: int8. scale_I: row ≈
    scale · integers. norm_I: ‖scale · integers‖ of each row. error_I: upper bound of
    ‖row − scale · integers‖.
    """

    def __init__(self, matrix_ID: Tensor) -> None:
        rows, columns = matrix_ID.shape
        self.integers_ID = torch.empty(rows, columns, dtype=torch.int8)
        self.scale_I, self.norm_I, self.error_I = torch.empty(3, rows)
        matrix_scale = power_of_two_scale(matrix_ID)

        def round_rows(rows: slice) -> None:
            matrix_BD = matrix_ID[rows].float() / matrix_scale
            scale_B = (matrix_BD.abs().amax(1) / _INT8_MAX).clamp(min=torch.finfo().tiny)
            rounded_BD = (matrix_BD / scale_B.unsqueeze(1)).round_()
            self.integers_ID[rows] = rounded_BD.to(torch.int8)
            rounded_BD *= scale_B.unsqueeze(1)
            self.scale_I[rows], self.norm_I[rows] = scale_B, rounded_BD.norm(dim=1)
            self.error_I[rows] = (matrix_BD - rounded_BD).norm(dim=1)

        for _ in in_parallel(round_rows, row_ranges(rows, _ROUNDED_ROWS), device=CPU):
            pass
        # Covers float32 rounding of the norms above and of the scores.
        self.error_I += 1e-5 * self.norm_I
