"""Starting prices for assignment solvers, from Sinkhorn's algorithm.

Legend: I rows and columns of a cost matrix, B rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resmoe_dist.design_matrix import row_ranges

# The entropy is in standard deviations of the costs. A higher entropy or more steps cost more time
# than they save in the solver.
_ENTROPY = 0.1
_STEPS = 2


def column_prices(cost_II: Tensor, block_rows: int) -> Tensor:
    """Column prices [I], float32. After subtracting them, rows compete for fewer columns.

    Sinkhorn's algorithm (Cuturi 2013) for columns only: solvers find row prices immediately.
    """
    entropy = _ENTROPY * float(cost_II[:block_rows].std())
    price_I = torch.zeros(len(cost_II))
    if not entropy > 0:
        return price_I
    for _ in range(_STEPS):
        demand_I = torch.zeros(len(cost_II))
        for rows in row_ranges(len(cost_II), block_rows):
            choice_BI = ((price_I - cost_II[rows].float()) / entropy).softmax(1)
            demand_I += choice_BI.sum(0)
        price_I -= entropy * demand_I.clamp(min=torch.finfo().tiny).log()
    return price_I
