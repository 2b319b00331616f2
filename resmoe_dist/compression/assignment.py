"""The best assignment of one matrix's rows to another's: exact, and without a solver if possible.

For equal uniform masses optimal transport is an assignment (Peyré and Cuturi 2020, proposition
2.1); row norms do not depend on it, so it maximises Σ_i s_{i,perm(i)} with s = target · expertᵀ.

- Where the best partners of all rows differ, they are the optimum. A product of 8-bit integers
  proves it, as long as every row's lead is larger than what rounding can have changed.
- Elsewhere a solver runs on float32 scores. It is exact from any column prices, and fast from good
  ones: two steps of Sinkhorn's algorithm give them.

Products are made in blocks; one I × I matrix is held, and only for a solver.

Legend: I rows, D columns, B rows of a block.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from resmoe_dist.compression.blocks import CPU, unit_of
from resmoe_dist.compression.threads import in_parallel
from resmoe_dist.errors import UserError

# Rows of a block: products run at full speed, and its scores take some tens of MB.
_BLOCK_ROWS = 1024
_ROUNDED_ROWS = 64
# Multiplications from which on it pays to try 8 bits first.
_CERTIFY_FROM = 1 << 28
# More undecided rows than this in a block, and a solver will be needed anyway.
_UNDECIDED_AT_MOST = _BLOCK_ROWS // 8
_INT8_MAX = 127
# Sinkhorn's entropy in standard deviations of the scores, and its steps: more of either took longer
# than it saved the solver. With fewer rows the solver is done sooner than the prices.
_SINKHORN_ENTROPY = 0.1
_SINKHORN_STEPS = 2
_SINKHORN_FROM = 512


def best_assignment(
    target_ID: Tensor, expert_ID: Tensor, *, solver: str = "scipy", device: torch.device = CPU
) -> Tensor:
    """The permutation [I] that maximises Σ_i ⟨target_i, expert[perm_i]⟩.

    target_ID: float32. expert_ID: any float dtype. solver: a key of `SOLVERS`. device: where the
    products are made.
    """
    rows, columns = target_ID.shape
    if device == CPU and rows * rows * columns >= _CERTIFY_FROM and _multiplies_int8(columns):
        certified_I = _certified_partners(target_ID, expert_ID)
        if certified_I is not None:
            return certified_I
    # In the solvers' own type and sign, so that they make no copy.
    cost_II = torch.empty(rows, rows, dtype=torch.float64)
    for block, score_IB in _score_columns(target_ID.to(device), expert_ID):
        cost_II[:, block] = score_IB.neg_().cpu()
    best_I = cost_II.argmin(1)
    if _is_permutation(best_I):
        return best_I
    if rows >= _SINKHORN_FROM:
        cost_II -= _sinkhorn_prices(cost_II)
    return torch.from_numpy(SOLVERS[solver](cost_II.numpy()))


def _score_columns(target_ID: Tensor, expert_ID: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Scores of all rows with one block of the expert's after the other, float32 [I, B].

    In units of the expert's largest entries: squares of very large or small ones leave float32.
    """
    unit = unit_of(expert_ID)
    for block in _blocks(len(expert_ID)):
        expert_BD = expert_ID[block].to(target_ID.device, torch.float32) / unit
        yield block, target_ID @ expert_BD.T


def _blocks(rows: int, at_most: int | None = None) -> Iterator[slice]:
    step = at_most or _BLOCK_ROWS
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _is_permutation(partner_I: Tensor) -> bool:
    return torch.equal(partner_I.sort().values, torch.arange(len(partner_I)))


def _multiplies_int8(columns: int) -> bool:
    """Whether this CPU multiplies 8-bit integers exactly and faster than floats."""
    has_instructions = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    return has_instructions and columns * _INT8_MAX**2 < 2**31


class _Rounded:
    """A matrix in 8-bit integers and one scale per row, with what the rounding is at most worth.

    norm_I: ‖scale · integers‖ of each row. error_I: ‖row − scale · integers‖, a little more.
    """

    def __init__(self, matrix_ID: Tensor) -> None:
        rows, columns = matrix_ID.shape
        self.integers_ID = torch.empty(rows, columns, dtype=torch.int8)
        self.scale_I, self.norm_I, self.error_I = torch.empty(3, rows)
        unit = unit_of(matrix_ID)

        def fill(block: slice) -> None:
            matrix_BD = matrix_ID[block].float() / unit
            scale_B = (matrix_BD.abs().amax(1) / _INT8_MAX).clamp(min=torch.finfo().tiny)
            rounded_BD = (matrix_BD / scale_B.unsqueeze(1)).round_()
            self.integers_ID[block] = rounded_BD.to(torch.int8)
            rounded_BD *= scale_B.unsqueeze(1)
            self.scale_I[block], self.norm_I[block] = scale_B, rounded_BD.norm(dim=1)
            self.error_I[block] = (matrix_BD - rounded_BD).norm(dim=1)

        for _ in in_parallel(fill, _blocks(rows, _ROUNDED_ROWS), device=CPU):
            pass
        # For the rounding of the sums above and of the scores to float32.
        self.error_I += 1e-5 * self.norm_I


def _certified_partners(target_ID: Tensor, expert_ID: Tensor) -> Tensor | None:
    """The optimum [I] where it is each row's best partner; None where that cannot be shown.

    By Cauchy and Schwarz a rounded score is wrong by at most ‖δt_i‖·‖w_j‖ + ‖t̂_i‖·‖δw_j‖.
    """
    target, expert = _Rounded(target_ID), _Rounded(expert_ID)
    reach_I = expert.norm_I + expert.error_I
    best_I = torch.empty(len(target_ID), dtype=torch.int64)
    for block in _blocks(len(target_ID)):
        products_BI = torch._int_mm(target.integers_ID[block], expert.integers_ID.T)
        score_BI = products_BI.float()
        score_BI *= expert.scale_I
        score_BI *= target.scale_I[block].unsqueeze(1)
        score_B, best_B = score_BI.max(1)
        score_BI.addr_(target.error_I[block], reach_I)
        score_BI.addr_(target.norm_I[block], expert.error_I)
        at_most_B = score_BI.gather(1, best_B.unsqueeze(1)).squeeze(1)
        rivals_BI = score_BI.scatter_(1, best_B.unsqueeze(1), -torch.inf)
        at_least_B = 2 * score_B - at_most_B
        undecided = (at_least_B <= rivals_BI.amax(1)).nonzero().squeeze(1)
        if len(undecided) > _UNDECIDED_AT_MOST:
            return None
        if len(undecided):
            rows_UD = target_ID[block][undecided]
            exact_UI = torch.cat([s for _, s in _score_columns(rows_UD, expert_ID)], 1)
            best_B[undecided] = exact_UI.argmax(1)
        best_I[block] = best_B
    return best_I if _is_permutation(best_I) else None


def _sinkhorn_prices(cost_II: Tensor) -> Tensor:
    """Column prices [I]: with them subtracted, few columns are wanted by more than one row.

    Cuturi 2013, from the columns' side only: prices of rows are found by a solver at once.
    """
    entropy = _SINKHORN_ENTROPY * float(cost_II[:_BLOCK_ROWS].std())
    price_I = torch.zeros(len(cost_II))
    if not entropy > 0:
        return price_I
    for _ in range(_SINKHORN_STEPS):
        wanted_I = torch.zeros(len(cost_II))
        for block in _blocks(len(cost_II)):
            choice_BI = ((price_I - cost_II[block].float()) / entropy).softmax(1)
            wanted_I += choice_BI.sum(0)
        price_I -= entropy * wanted_I.clamp(min=torch.finfo().tiny).log()
    return price_I


def _solve_scipy(cost_II: np.ndarray) -> np.ndarray:
    return linear_sum_assignment(cost_II)[1]


def _solve_lapx(cost_II: np.ndarray) -> np.ndarray:
    import lap  # optional: `pip install lapx`

    return lap.lapjv(cost_II, return_cost=False)[0].astype(np.int64)


# Exact solvers of the assignment problem: cost [I, I] (float64, may be overwritten) to the column
# of each row. They agree but where several assignments cost the same.
SOLVERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "scipy": _solve_scipy,
    "lapx": _solve_lapx,
}


def check_solver(name: str) -> None:
    """Raise UserError where a solver's package is not installed."""
    if name == "lapx" and importlib.util.find_spec("lap") is None:
        raise UserError("--solver lapx: not installed; run pip install lapx, or use scipy")
