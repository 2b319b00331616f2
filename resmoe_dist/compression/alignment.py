"""Row alignment of a group's experts: the permutations T_k of paper 001, equation 4.

The objective is (1/N) Σ_k ‖T_k W_k − C‖² with C the mean of the aligned experts.

Legend: N experts of the group, I rows, D columns, B rows of a block.
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
from resmoe_dist.compression.blocks import CPU, unit_of

# Up to this many rows an assignment takes milliseconds: a second start costs next to nothing, and
# sweeps are made until nothing moves.
_SMALL_ROWS = 512
_SWEEPS = 2
# Past it a sweep ends at the first expert whose step, made by all N, would lower the objective by
# less than this share. On unrelated Gaussian experts a whole sweep lowers it by 0.02 %.
_SWEEP_GAIN = 1e-3
_SAMPLE_ROWS = 256
_BLOCK_ENTRIES = 1 << 22

# assign(target_ID, expert_ID) returns the best permutation [I].
Assign = Callable[[Tensor, Tensor], Tensor]


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
    """(1/N) Σ_k ‖W_k[perm_k] − C‖² with C the mean, in blocks of rows."""
    count, _, columns = experts_NID.shape
    # Squares of very large or small weights leave float32.
    unit = unit_of(experts_NID)
    step = max(1, _BLOCK_ENTRIES // (count * columns))
    total = 0.0
    for perm_NB in permutations_NI.split(step, dim=1):
        block_NBD = torch.stack([w[perm] for w, perm in zip(experts_NID, perm_NB, strict=True)])
        block_NBD = block_NBD.float() / unit
        # Against the first one first: what they have in common would round the mean.
        block_NBD -= block_NBD[0].clone()
        block_NBD -= block_NBD.mean(0)
        total += float(block_NBD.square_().sum(-1).double().sum())
    return total / count * unit * unit


def align_leave_one_out(experts_NID: Tensor, assign: Assign) -> Tensor:
    """Align each expert to the sum of the others: permutations [N, I].

    Minimising equation 4 over T_k with the others fixed is an assignment to Σ_{j≠k} T_j W_j: each
    step lowers the objective or leaves it. Started progressively: W_2 to W_1, W_3 to W_1 + W_2 …

    With few rows the descent may end above the papers' alternation (of random groups of 2 to 8
    experts with 8 to 64 rows one in 200 does, by up to 5 %). There it is started a second time,
    where that alternation ends, and the lower end is kept. With more rows it was seen above only
    where there are far fewer columns than rows.
    """
    count, rows, _ = experts_NID.shape
    permutations = _progressive_start(experts_NID, assign)
    # Two experts have one assignment between them: it is already the optimum.
    if count <= 2:
        return permutations
    if rows > _SMALL_ROWS:
        worth_it = _SWEEP_GAIN * objective_of(experts_NID, permutations)
        return _descend(experts_NID, permutations, assign, least_drop=worth_it)
    first = _descend(experts_NID, permutations, assign)
    second = _descend(experts_NID, _alternation_start(experts_NID, assign), assign)
    return min(first, second, key=lambda found: objective_of(experts_NID, found))


def _progressive_start(experts_NID: Tensor, assign: Assign) -> Tensor:
    permutations = rows_as_stored(experts_NID)
    # A sum in units of the experts stays within float32.
    share = 1 / unit_of(experts_NID)
    total_ID = experts_NID[0].float() * share
    for k in range(1, len(experts_NID)):
        permutations[k] = assign(total_ID, experts_NID[k])
        _add_rows(total_ID, experts_NID[k], permutations[k], share)
    return permutations


def _alternation_start(experts_NID: Tensor, assign: Assign) -> Tensor:
    """Where the papers' alternation ends: all experts to their mean, from the first expert on."""
    target_ID, objective = experts_NID[0].float(), float("inf")
    permutations = rows_as_stored(experts_NID)
    while True:
        found = torch.stack([assign(target_ID, expert) for expert in experts_NID])
        reached = Alignment(found, objective_of(experts_NID, found))
        # Rounding alone may trade equals for ever: without a gain it is over.
        if not reached.objective < objective:
            return permutations
        permutations, objective = found, reached.objective
        target_ID = (reached.apply(experts_NID).float() / unit_of(experts_NID)).mean(0)


def _descend(
    experts_NID: Tensor, permutations_NI: Tensor, assign: Assign, *, least_drop: float = 0.0
) -> Tensor:
    """Up to `_SWEEPS` sweeps of leave-one-out steps from `permutations_NI`.

    Ends early where a sweep moves nothing, or a step promises less than `least_drop` of a sweep.
    """
    count = len(experts_NID)
    permutations = permutations_NI.clone()
    unit = unit_of(experts_NID)
    total_ID = torch.zeros(experts_NID.shape[1:])
    for expert_ID, perm in zip(experts_NID, permutations, strict=True):
        _add_rows(total_ID, expert_ID, perm, 1 / unit)
    for _ in range(_SWEEPS):
        moved = False
        for k, expert_ID in enumerate(experts_NID):
            _add_rows(total_ID, expert_ID, permutations[k], -1 / unit)
            # The objective is Σ‖W‖²/N − ‖Σ T W‖²/N²: its drop is 2·gain/N², N times that a sweep's.
            if least_drop:
                most = _gain_at_most(total_ID, expert_ID, permutations[k]) * unit
                if 2 * most / count < least_drop:
                    return permutations
            better = assign(total_ID, expert_ID)
            moved |= not torch.equal(better, permutations[k])
            old, permutations[k] = permutations[k].clone(), better
            if least_drop:
                gain = _gain(total_ID, expert_ID, old, better) * unit
                if 2 * gain / count < least_drop:
                    return permutations
            _add_rows(total_ID, expert_ID, better, 1 / unit)
        if not moved:
            break
    return permutations


def _rows_of_block(matrix_ID: Tensor) -> int:
    return max(1, _BLOCK_ENTRIES // matrix_ID.shape[1])


def _add_rows(total_ID: Tensor, expert_ID: Tensor, perm_I: Tensor, share: float) -> None:
    """total += share · expert[perm], without a permuted copy of the expert."""
    step = _rows_of_block(expert_ID)
    for total_BD, rows in zip(total_ID.split(step), perm_I.split(step), strict=True):
        total_BD.add_(expert_ID[rows].float(), alpha=share)


def _gain_at_most(target_ID: Tensor, expert_ID: Tensor, perm_I: Tensor) -> float:
    """What Σ_i ⟨target_i, expert[perm_i]⟩ could gain, were every row's best partner free.

    From a sample of the rows: a small part of what an assignment costs.
    """
    step = max(1, len(perm_I) // _SAMPLE_ROWS)
    # Products of very small weights leave float32.
    target_unit, expert_unit = unit_of(target_ID), unit_of(expert_ID)
    sample_SD = target_ID[::step] / target_unit
    parts = expert_ID.split(_rows_of_block(expert_ID))
    score_SI = torch.cat([sample_SD @ (part_BD.float() / expert_unit).T for part_BD in parts], 1)
    now_S = score_SI.gather(1, perm_I[::step].unsqueeze(1)).squeeze(1)
    gain = float((score_SI.amax(1) - now_S).double().mean())
    return gain * len(perm_I) * target_unit * expert_unit


def _gain(target_ID: Tensor, expert_ID: Tensor, old_I: Tensor, new_I: Tensor) -> float:
    """Σ_i ⟨target_i, expert[new_i] − expert[old_i]⟩."""
    total = 0.0
    for rows in (old_I != new_I).nonzero().squeeze(1).split(_rows_of_block(expert_ID)):
        steps_BD = expert_ID[new_I[rows]].double() - expert_ID[old_I[rows]]
        total += float((target_ID[rows] * steps_BD).sum())
    return total


def align_pot(experts_NID: Tensor, assign: Assign) -> Tensor:
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


def rows_as_stored(experts_NID: Tensor) -> Tensor:
    """The permutations [N, I] that change nothing."""
    count, rows, _ = experts_NID.shape
    return torch.arange(rows).repeat(count, 1)


ALIGNERS: dict[str, Callable[[Tensor, Assign], Tensor]] = {
    "loo": align_leave_one_out,
    "pot": align_pot,
    "none": lambda experts_NID, _: rows_as_stored(experts_NID),
}


def align(
    experts_NID: Tensor,
    method: str = "loo",
    *,
    solver: str = "scipy",
    device: torch.device = CPU,
) -> Alignment:
    """Align experts [N, I, D] (any float dtype) by `method`, a key of `ALIGNERS`.

    solver and device: of `best_assignment`, where the method uses it.
    """
    assign = partial(best_assignment, solver=solver, device=device)
    permutations = ALIGNERS[method](experts_NID, assign)
    return Alignment(permutations, objective_of(experts_NID, permutations))
