"""Row alignment of a group's experts: the permutations T_k of paper 001, equation 4.

Legend: E experts of the group, I rows, D columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import ot
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from resmoe_dist.compression.assignment import best_assignment
from resmoe_dist.compression.blocks import CPU
from resmoe_dist.compression.descent import Assign, align_leave_one_out
from resmoe_dist.compression.objective import alignment_objective
from resmoe_dist.compression.permutations import identity_permutations, permute_rows
from resmoe_dist.compression.stages import stage


@dataclass(frozen=True)
class Alignment:
    """The result of `align`.

    permutations_EI: expert k in aligned order is W_k[permutations_EI[k]]. objective: the value of
    equation 4 (see `alignment_objective`).
    """

    permutations_EI: Tensor
    objective: float

    def apply(self, experts_EID: Tensor) -> Tensor:
        """Aligned copies [E, I, D] of the experts."""
        return permute_rows(experts_EID, self.permutations_EI)


def align_pot(experts_EID: Tensor, assign: Assign) -> Tensor:
    """The papers' method, with POT: a free-support barycentre, then transport of each expert to it.

    Paper 001, section 4.2. The barycentre starts from the first expert. POT's own iteration limits
    apply. If a transport plan is not a permutation, it is rounded to the nearest one. `assign` is
    not used. Returns permutations [E, I].
    """
    count, rows, _ = experts_EID.shape
    mass_I = np.full(rows, 1.0 / rows)
    points = [expert.double().numpy() for expert in experts_EID]
    with warnings.catch_warnings():
        # POT warns if its solver reaches the iteration limit. The papers used such results too.
        warnings.simplefilter("ignore")
        with stage("barycenter"):
            barycenter_ID = ot.lp.free_support_barycenter(
                points, [mass_I] * count, X_init=points[0].copy(), b=mass_I
            )
        plans = [ot.emd(mass_I, mass_I, ot.dist(barycenter_ID, expert_ID)) for expert_ID in points]
    return torch.stack(
        [torch.from_numpy(linear_sum_assignment(plan, maximize=True)[1]) for plan in plans]
    )


def align_ot_fusion(experts_EID: Tensor, assign: Assign) -> Tensor:
    """OT Fusion (paper 000, appendix B.2): each layer of the MLP is aligned before the next.

    The input projections, with their biases, decide the order of the neurons as in `align_pot`; the
    output projection follows. The output elements keep their order, because a residual is added
    to the centre element by element. experts_EID: input columns alone. Returns permutations [E, I].
    """
    return align_pot(experts_EID, assign)


# Those of `ALIGNERS` that see the columns of input projections alone.
ALIGN_BY_INPUTS = ("ot_fusion",)

# Alignment methods by name: experts [E, I, D] -> permutations [E, I].
ALIGNERS: dict[str, Callable[[Tensor, Assign], Tensor]] = {
    "loo": align_leave_one_out,
    "pot": align_pot,
    "ot_fusion": align_ot_fusion,
    "none": lambda experts_EID, _: identity_permutations(experts_EID),
}


@stage("align")
def align(
    experts_EID: Tensor,
    method: str = "loo",
    *,
    solver: str = "scipy",
    device: torch.device = CPU,
    input_columns: Tensor | None = None,
) -> Alignment:
    """Align experts [E, I, D] (any float dtype) with `method`, a key of `ALIGNERS`.

    solver, device: passed on to `best_assignment`; "loo" is the only method that uses them.
    input_columns: those of the input projections, for "ot_fusion"; None takes all columns.
    """
    assign = partial(best_assignment, solver=solver, device=device)
    compared_EID = experts_EID
    if method in ALIGN_BY_INPUTS and input_columns is not None:
        compared_EID = experts_EID[:, :, input_columns]
    permutations_EI = ALIGNERS[method](compared_EID, assign)
    return Alignment(permutations_EI, alignment_objective(experts_EID, permutations_EI))
