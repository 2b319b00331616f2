"""The search for the path through a bit-shift trellis whose values are closest to given entries.

A path's windows overlap: the next window is this one without its `bits` lowest bits, with as many
new ones at the top. Viterbi's algorithm keeps the best path into each of the S windows. If errors
of different entries have cross terms, the best path into a window also depends on its past, and a
beam of the best paths so far is kept instead.

Both are operations of the C++ library that `resmoe_dist.kernels` builds and loads. Without it, both
run in PyTorch, much slower.

Legend: R rows, C entries of a row, S = 2^L windows, J = 2^bits windows after or before a window,
P paths, N = P·J continuations of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that are searched together in PyTorch.
_BEAM_ROWS = 64
# In place of the window before a row: any first window may be chosen.
FREE = -1


def search_path(
    target_RC: Tensor, values_S: Tensor, before_R: Tensor, *, bits: int, coded: int
) -> Tensor:
    """Windows [R, coded], int32: the path with the least squared error over all C entries.

    target_RC, values_S: float32, of order 1. before_R: int32, the window before a row, or FREE.
    """
    if hasattr(torch.ops.resmoe, "search_path"):
        return torch.ops.resmoe.search_path(target_RC, values_S, before_R, bits, coded, 0)
    return search_in_torch(target_RC, values_S, before_R, bits=bits, coded=coded)


def search_beam(
    weights_RC: Tensor,
    scales_RC: Tensor,
    root_CC: Tensor,
    values_S: Tensor,
    before_R: Tensor,
    *,
    bits: int,
    coded: int,
    width: int,
) -> Tensor:
    """Windows [R, coded], int32: a path with a small error Σ_j (e_j / U_jj)² over all C entries.

    e_j: error of entry j after those before it were fed back to it (see `feedback.py`), with the
    upper U = `root_CC`. An entry stands for its value times its scale. width: paths that are kept.
    """
    if hasattr(torch.ops.resmoe, "search_beam"):
        return torch.ops.resmoe.search_beam(
            weights_RC, scales_RC, root_CC, values_S, before_R, bits, coded, width, 0
        )
    split = (tensor_R.split(_BEAM_ROWS) for tensor_R in (weights_RC, scales_RC, before_R))
    parts = [
        search_beam_in_torch(
            weights_rC, scales_rC, root_CC, values_S, before_r, bits=bits, coded=coded, width=width
        )
        for weights_rC, scales_rC, before_r in zip(*split, strict=True)
    ]
    return torch.cat(parts)


def divisor_of(scales: Tensor) -> Tensor:
    """Scales to divide by: 1 in place of the 0 that groups of zeros have."""
    return torch.where(scales > 0, scales, torch.ones(()))


def search_in_torch(
    target_RC: Tensor, values_S: Tensor, before_R: Tensor, *, bits: int, coded: int
) -> Tensor:
    """`search_path` in PyTorch: the reference."""
    step = 1 << bits
    keep = len(values_S) // step
    window_S = torch.arange(len(values_S))
    cost_RS = (target_RC[:, :1] - values_S) ** 2
    # After a given window, only those windows are possible that continue it.
    is_free_R1 = (before_R == FREE).unsqueeze(1)
    continues_RS = (window_S % keep) == (before_R >> bits).unsqueeze(1)
    cost_RS = cost_RS.masked_fill(~(is_free_R1 | continues_RS), float("inf"))
    chosen = []
    for target_R in target_RC[:, 1:].unbind(1):
        # Windows r·J … r·J + J − 1 lead to the windows that are r but for their new bits.
        least_RK, from_RK = cost_RS.view(len(cost_RS), keep, step).min(2)
        chosen.append(from_RK)
        cost_RS = least_RK.repeat(1, step) + (target_R.unsqueeze(1) - values_S) ** 2
    window_R = cost_RS.argmin(1)
    path = [window_R]
    for from_RK in reversed(chosen):
        kept_R = window_R % keep
        window_R = kept_R * step + from_RK.gather(1, kept_R.unsqueeze(1)).squeeze(1)
        path.append(window_R)
    return torch.stack(path[::-1], dim=1)[:, :coded].int()


def search_beam_in_torch(
    weights_RC: Tensor,
    scales_RC: Tensor,
    root_CC: Tensor,
    values_S: Tensor,
    before_R: Tensor,
    *,
    bits: int,
    coded: int,
    width: int,
) -> Tensor:
    """`search_beam` in PyTorch: the reference.

    Per entry, the `width` cheapest continuations of all paths are kept, and of those that end in
    the same window only the cheapest. Of equals, the first one counts; paths stay in order.
    """
    rows, window_bits = len(weights_RC), len(values_S).bit_length() - 1
    new_bits, never = window_bits - bits, float("inf")
    # One path for each end of a window that may come before the first entry.
    end_P = torch.arange(1 << new_bits)
    is_possible_RP = (before_R == FREE).unsqueeze(1) | ((before_R >> bits).unsqueeze(1) == end_P)
    cost_RP = torch.zeros(is_possible_RP.shape).masked_fill(~is_possible_RP, never)
    window_RP = (end_P << bits).expand(rows, -1)
    error_RPC = torch.zeros(rows, len(end_P), 0)
    path_RPC = torch.zeros(rows, len(end_P), 0, dtype=torch.int64)
    for i, (weight_R1, scale_R1) in enumerate(
        zip(weights_RC.split(1, 1), scales_RC.split(1, 1), strict=True)
    ):
        # The errors of a path, in units of U's diagonal, change what this entry should be.
        unit = 1 / root_CC[i, i]
        target_RP = (weight_R1 - error_RPC @ root_CC[:i, i]) * unit
        next_RPJ = (window_RP >> bits).unsqueeze(2) | torch.arange(1 << bits) << new_bits
        missed_RPJ = target_RP.unsqueeze(2) - (scale_R1 * unit).unsqueeze(2) * values_S[next_RPJ]
        cost_RN = (cost_RP.unsqueeze(2) + missed_RPJ.square()).flatten(1)
        kept_RP = cost_RN.sort(dim=1, stable=True).indices[:, :width].sort(dim=1).values
        parent_RP1 = (kept_RP >> bits).unsqueeze(2)
        missed_RP1 = missed_RPJ.flatten(1).gather(1, kept_RP).unsqueeze(2)
        window_RP = next_RPJ.flatten(1).gather(1, kept_RP)
        cost_RP = cost_RN.gather(1, kept_RP)
        cost_RP = cost_RP.masked_fill(_has_cheaper_equal(window_RP, cost_RP), never)
        error_RPC = torch.cat([_take(error_RPC, parent_RP1), missed_RP1], dim=2)
        path_RPC = torch.cat([_take(path_RPC, parent_RP1), window_RP.unsqueeze(2)], dim=2)
    best_R11 = cost_RP.argmin(1).view(-1, 1, 1)
    return _take(path_RPC, best_R11).squeeze(1)[:, :coded].int()


def _has_cheaper_equal(window_RP: Tensor, cost_RP: Tensor) -> Tensor:
    """[R, P]: whether a path ends in the window of a cheaper one, or of an earlier equal one."""
    order_P = torch.arange(window_RP.shape[1])
    is_same_RPP = window_RP.unsqueeze(2) == window_RP.unsqueeze(1)
    is_less_RPP = cost_RP.unsqueeze(1) < cost_RP.unsqueeze(2)
    is_equal_RPP = cost_RP.unsqueeze(1) == cost_RP.unsqueeze(2)
    is_before_PP = order_P < order_P.unsqueeze(1)
    return (is_same_RPP & (is_less_RPP | is_equal_RPP & is_before_PP)).any(2)


def _take(values_RPC: Tensor, path_RP1: Tensor) -> Tensor:
    """The values of some paths."""
    return values_RPC.gather(1, path_RP1.expand(-1, -1, values_RPC.shape[2]))
