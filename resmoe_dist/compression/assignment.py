"""The optimal assignment of one matrix's rows to another's. Exact; avoids the solver if possible.

Between uniform distributions with equally many points, optimal transport is an assignment (Peyré
and Cuturi 2020, proposition 2.1). Row norms do not depend on the assignment, so minimising squared
distances means maximising Σ_i s_{i,perm(i)}, with scores s = target · expertᵀ.

1. If the best partners of all rows are different, they are the optimum. Products of 8-bit integers
   often prove it (`certificate`).
2. Otherwise a solver runs on float32 scores. It is exact from any column prices, and faster from
   good ones (`sinkhorn`).

Products are computed in blocks. Only the solver needs a whole I × I matrix.

Legend: I rows, D columns, B rows of a block.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from resmoe_dist.compression.blocks import CPU
from resmoe_dist.compression.certificate import certified_assignment, supports_int8_products
from resmoe_dist.compression.scores import is_permutation, score_blocks
from resmoe_dist.compression.sinkhorn import column_prices
from resmoe_dist.errors import UserError


@dataclass(frozen=True)
class AssignmentTuning:
    """Sizes and thresholds of `best_assignment`. They change its speed; the optimum stays the same.

    block_rows: rows per block. By default, products run at full speed and their results take tens
    of MB. min_int8_multiplications: problems with fewer multiplications skip the 8-bit certificate.
    max_undecided: the certificate gives up if 8 bits leave more rows of a block undecided, because
    a solver is then likely to be needed anyway. min_sinkhorn_rows: with fewer rows the solver is
    faster than computing its prices.
    """

    block_rows: int = 1024
    min_int8_multiplications: int = 1 << 28
    max_undecided: int = 128
    min_sinkhorn_rows: int = 512


def best_assignment(
    target_ID: Tensor,
    expert_ID: Tensor,
    *,
    solver: str = "scipy",
    device: torch.device = CPU,
    tuning: AssignmentTuning = AssignmentTuning(),
) -> Tensor:
    """The permutation [I] that maximises Σ_i ⟨target_i, expert[perm_i]⟩.

    target_ID: float32. expert_ID: any float dtype. solver: a key of `SOLVERS`. device: where scores
    are computed.
    """
    rows, columns = target_ID.shape
    large = rows * rows * columns >= tuning.min_int8_multiplications
    if device == CPU and large and supports_int8_products(columns):
        certified_I = certified_assignment(
            target_ID,
            expert_ID,
            block_rows=tuning.block_rows,
            max_undecided=tuning.max_undecided,
        )
        if certified_I is not None:
            return certified_I
    # The dtype and sign that solvers work on, so that they do not copy.
    cost_II = torch.empty(rows, rows, dtype=torch.float64)
    for block, score_IB in score_blocks(target_ID.to(device), expert_ID, tuning.block_rows):
        cost_II[:, block] = score_IB.neg_().cpu()
    best_I = cost_II.argmin(1)
    if is_permutation(best_I):
        return best_I
    if rows >= tuning.min_sinkhorn_rows:
        cost_II -= column_prices(cost_II, tuning.block_rows)
    return torch.from_numpy(SOLVERS[solver](cost_II.numpy()))


def _solve_scipy(cost_II: np.ndarray) -> np.ndarray:
    return linear_sum_assignment(cost_II)[1]


def _solve_lapx(cost_II: np.ndarray) -> np.ndarray:
    import lap  # optional: `pip install lapx`

    return lap.lapjv(cost_II, return_cost=False)[0].astype(np.int64)


# Exact solvers of the assignment problem. Cost [I, I] (float64, may be overwritten) -> the column
# of each row. Their results differ only between assignments of equal cost.
SOLVERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "scipy": _solve_scipy,
    "lapx": _solve_lapx,
}


def check_solver(name: str) -> None:
    """Raise UserError if the package of solver `name` is not installed."""
    if name == "lapx" and importlib.util.find_spec("lap") is None:
        raise UserError("--solver lapx: not installed; run pip install lapx, or use scipy")
