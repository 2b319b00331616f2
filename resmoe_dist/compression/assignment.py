"""Row alignment of a group's experts: the permutations T_k of paper 001, equation 4.

The objective is (1/N) Σ_k ‖T_k W_k − C‖² with C the mean of the aligned experts. For equal uniform
masses optimal transport is an assignment (Peyré and Cuturi 2020, proposition 2.1); row norms do not
depend on it, so one assignment maximises Σ_i ⟨target_i, W_k[perm_i]⟩: a single matrix product.

Legend: N experts of the group, I rows, D columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import ot
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# Almost all of the gain comes with the first sweep (design measurements); the second polishes.
_SWEEPS = 2
# Up to this many rows an assignment takes milliseconds, and a second start costs next to nothing.
_TWO_STARTS_ROWS = 512


@dataclass(frozen=True)
class Alignment:
    """permutations_NI: aligned expert k is W_k[permutations_NI[k]]. objective: of equation 4."""

    permutations_NI: Tensor
    objective: float

    def apply(self, experts_NID: Tensor) -> Tensor:
        """Aligned copies [N, I, D] of the experts."""
        return torch.stack(
            [expert[perm] for expert, perm in zip(experts_NID, self.permutations_NI, strict=True)]
        )


def objective_of(experts_NID: Tensor, permutations_NI: Tensor) -> float:
    """(1/N) Σ_k ‖W_k[perm_k] − C‖² with C the mean, in float64."""
    count = len(experts_NID)
    total = torch.zeros(experts_NID.shape[1:], dtype=torch.float64)
    for expert, perm in zip(experts_NID, permutations_NI, strict=True):
        total += expert[perm]
    squares = sum(float(expert.double().square().sum()) for expert in experts_NID)
    return max(squares / count - float(total.square().sum()) / count**2, 0.0)


def best_assignment(target_ID: Tensor, expert_ID: Tensor) -> Tensor:
    """The permutation [I] that maximises Σ_i ⟨target_i, expert[perm_i]⟩, exactly."""
    # In units of the target's largest entry: squares of very large or small weights leave float32.
    unit = float(target_ID.abs().max()) or 1.0
    score_II = (target_ID / unit) @ expert_ID.T
    # Where the best partner of every row is a different one, no assignment can do better. Upcycled
    # experts are usually that easy, and the solver is then not needed.
    best_I = score_II.argmax(1)
    if torch.equal(best_I.sort().values, torch.arange(len(best_I))):
        return best_I
    _, columns = linear_sum_assignment(score_II.numpy(), maximize=True)
    return torch.from_numpy(columns)


def align_leave_one_out(experts_NID: Tensor) -> Tensor:
    """Align each expert to the sum of the others: permutations [N, I].

    Minimising equation 4 over T_k with the others fixed is an assignment to Σ_{j≠k} T_j W_j: each
    step lowers the objective or leaves it. Started progressively: W_2 to W_1, W_3 to W_1 + W_2 …

    With few rows the descent may end above the papers' alternation (of random groups of 2 to 8
    experts with 8 to 64 rows one in 200 does, by up to 5 %). There it is started a second time,
    where that alternation ends, and the lower end is kept. With more rows it was seen above only
    where there are far fewer columns than rows.
    """
    count, rows, _ = experts_NID.shape
    permutations = _progressive_start(experts_NID)
    # Two experts have one assignment between them: it is already the optimum.
    if count <= 2:
        return permutations
    permutations = _descend(experts_NID, permutations)
    if rows > _TWO_STARTS_ROWS:
        return permutations
    second = _descend(experts_NID, _alternation_start(experts_NID))
    return min(permutations, second, key=lambda found: objective_of(experts_NID, found))


def _progressive_start(experts_NID: Tensor) -> Tensor:
    permutations = align_none(experts_NID)
    total_ID = experts_NID[0].clone()
    for k in range(1, len(experts_NID)):
        permutations[k] = best_assignment(total_ID, experts_NID[k])
        total_ID += experts_NID[k][permutations[k]]
    return permutations


def _alternation_start(experts_NID: Tensor) -> Tensor:
    """Where the papers' alternation ends: all experts to their mean, from the first expert on."""
    target_ID, objective = experts_NID[0], float("inf")
    permutations = align_none(experts_NID)
    while True:
        found = torch.stack([best_assignment(target_ID, expert) for expert in experts_NID])
        reached = Alignment(found, objective_of(experts_NID, found))
        # Rounding alone may trade equals for ever: without a gain it is over.
        if not reached.objective < objective:
            return permutations
        permutations, objective = found, reached.objective
        target_ID = reached.apply(experts_NID).mean(0)


def _descend(experts_NID: Tensor, permutations_NI: Tensor) -> Tensor:
    """Up to `_SWEEPS` sweeps of leave-one-out steps from `permutations_NI`."""
    permutations = permutations_NI.clone()
    total_ID = torch.zeros_like(experts_NID[0])
    for expert_ID, perm in zip(experts_NID, permutations, strict=True):
        total_ID += expert_ID[perm]
    for _ in range(_SWEEPS):
        moved = False
        for k, expert_ID in enumerate(experts_NID):
            total_ID -= expert_ID[permutations[k]]
            better = best_assignment(total_ID, expert_ID)
            moved |= not torch.equal(better, permutations[k])
            permutations[k] = better
            total_ID += expert_ID[better]
        if not moved:
            break
    return permutations


def align_pot(experts_NID: Tensor) -> Tensor:
    """The papers' way: POT's free-support barycentre started at the first expert, then transport.

    Paper 001, section 4.2. POT's own iteration limits apply; a transport plan that it left short of
    a permutation is rounded to the nearest one. Returns permutations [N, I].
    """
    count, rows, _ = experts_NID.shape
    weights_I = np.full(rows, 1.0 / rows)
    points = [expert.double().numpy() for expert in experts_NID]
    with warnings.catch_warnings():
        # POT warns when its solver stops at the iteration limit; the papers used it as it is.
        warnings.simplefilter("ignore")
        barycenter_ID = ot.lp.free_support_barycenter(
            points, [weights_I] * count, X_init=points[0].copy(), b=weights_I
        )
        plans = [
            ot.emd(weights_I, weights_I, ot.dist(barycenter_ID, expert_ID)) for expert_ID in points
        ]
    return torch.stack(
        [torch.from_numpy(linear_sum_assignment(plan, maximize=True)[1]) for plan in plans]
    )


def align_none(experts_NID: Tensor) -> Tensor:
    """Rows in the order they are stored in: permutations [N, I]."""
    count, rows, _ = experts_NID.shape
    return torch.arange(rows).repeat(count, 1)


ALIGNERS: dict[str, Callable[[Tensor], Tensor]] = {
    "loo": align_leave_one_out,
    "pot": align_pot,
    "none": align_none,
}


def align(experts_NID: Tensor, method: str = "loo") -> Alignment:
    """Align experts [N, I, D] (float32) by `method`, a key of `ALIGNERS`."""
    permutations = ALIGNERS[method](experts_NID)
    return Alignment(permutations, objective_of(experts_NID, permutations))
