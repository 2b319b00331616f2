"""The search for the path through a bit-shift trellis whose values are closest to given entries.

A path's windows overlap: the next window is this one without its `bits` lowest bits, with as many
new ones at the top. Viterbi's algorithm keeps the best path into each of the S windows. If errors
of different entries have cross terms, the best path into a window also depends on its past, and a
beam of the best paths so far is kept instead.

Both are operations of the C++ library that `resmoe_dist.kernels` builds and loads. Without it,
Viterbi's search runs in PyTorch, much slower, and cross terms are left out of the search.

Legend: R rows, C entries of a row, S = 2^L windows, J = 2^bits predecessors of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# In place of the window before a row: any first window may be chosen.
FREE = -1


class TrellisPath(NamedTuple):
    """first_R: windows of the first entries. symbols_RC: the new bits of each window, uint8.
    last_R: windows of the last coded entries."""

    first_R: Tensor
    symbols_RC: Tensor
    last_R: Tensor


def search_path(
    target_RC: Tensor, values_S: Tensor, before_R: Tensor, *, bits: int, coded: int
) -> TrellisPath:
    """The path with the least squared error over all C entries, its first `coded` ones.

    target_RC, values_S: float32, of order 1. before_R: int32, the window before a row, or FREE.
    """
    if hasattr(torch.ops.resmoe, "search_path"):
        found = torch.ops.resmoe.search_path(target_RC, values_S, before_R, bits, coded)
        return TrellisPath(*found)
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
) -> TrellisPath:
    """A path with a small error Σ_j (e_j / U_jj)², its first `coded` entries.

    e_j: error of entry j after those before it were fed back to it (see `feedback.py`), with the
    upper U = `root_CC`. An entry stands for its value times its scale. width: paths that are kept.
    """
    if hasattr(torch.ops.resmoe, "search_beam"):
        found = torch.ops.resmoe.search_beam(
            weights_RC, scales_RC, root_CC, values_S, before_R, bits, coded, width
        )
        return TrellisPath(*found)
    target_RC = weights_RC / divisor_of(scales_RC)
    return search_path(target_RC, values_S, before_R, bits=bits, coded=coded)


def divisor_of(scales: Tensor) -> Tensor:
    """Scales to divide by: 1 in place of the 0 that groups of zeros have."""
    return torch.where(scales > 0, scales, torch.ones(()))


def search_in_torch(
    target_RC: Tensor, values_S: Tensor, before_R: Tensor, *, bits: int, coded: int
) -> TrellisPath:
    """`search_path` in PyTorch: the reference."""
    window_bits, step = len(values_S).bit_length() - 1, 1 << bits
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
    path_RC = torch.stack(path[::-1], dim=1)[:, :coded]
    symbols_RC = (path_RC >> (window_bits - bits)).to(torch.uint8)
    return TrellisPath(path_RC[:, 0].int(), symbols_RC, path_RC[:, -1].int())
