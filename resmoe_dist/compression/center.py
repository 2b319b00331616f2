"""The centre of a group and its residuals.

`barycenter` and `mean` are the papers' two steps: the mean of the experts (aligned, or as stored),
then encode what is left. `joint` chooses the two together:

- for codecs that keep or drop single entries, exactly (`windowed_center`);
- for the others by alternation, while the error falls (`alternating_center`).

Legend: N experts of the group, I rows, D columns, C entries of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from resmoe_dist.codecs import EncodedResidual

# Entries handled at a time by the windowed centre: N·N temporaries of this size stay in tens of MB.
_CHUNK_ENTRIES = 1 << 18
# A spread, relative to the square of the entry's largest value, that float32 cannot show.
_FREE = 1e-14
_MAX_ALTERNATIONS = 10
# Alternation stops when a round gains less than this share of the error.
_ALTERNATION_GAIN = 1e-3


@dataclass(frozen=True)
class Encoded:
    """A group after encoding.

    center_ID: the centre in the stored dtype; None where the codec has none. residuals: one per
    expert. squared_errors: ‖T_k W_k − restored_k‖² per expert, with everything rounded as stored.
    """

    center_ID: Tensor | None
    residuals: list[EncodedResidual]
    squared_errors: list[float]


def encode_group(
    aligned_NID: Tensor,
    codec: type[EncodedResidual],
    *,
    center: str,
    keep: float,
    dtype: torch.dtype,
) -> Encoded:
    """Centre and residuals of aligned experts [N, I, D] (float32).

    center: `joint`, `barycenter` or `mean` (the last two are the same average; with `mean` the
    caller has not aligned). keep: share of residual entries to keep. dtype: of stored values.
    """
    masks = None
    if not codec.uses_center:
        center_ID = None
    elif center != "joint":
        center_ID = aligned_NID.mean(0).to(dtype)
    elif codec.chooses_entries:
        center_ID, masks = windowed_center(aligned_NID, keep)
        center_ID = center_ID.to(dtype)
    else:
        return alternating_center(aligned_NID, codec, keep=keep, dtype=dtype)
    return _encode(aligned_NID, center_ID, codec, keep=keep, dtype=dtype, masks_NID=masks)


def _encode(
    aligned_NID: Tensor,
    center_ID: Tensor | None,
    codec: type[EncodedResidual],
    *,
    keep: float,
    dtype: torch.dtype,
    masks_NID: Tensor | None = None,
) -> Encoded:
    """Residuals against the centre as it is stored, so that its rounding is made good in them."""
    residuals, squared_errors = [], []
    for k, expert_ID in enumerate(aligned_NID):
        target_ID = expert_ID if center_ID is None else expert_ID - center_ID.float()
        mask_ID = None if masks_NID is None else masks_NID[k]
        residual = codec.encode(target_ID, keep=keep, dtype=dtype, mask_ID=mask_ID)
        residuals.append(residual)
        difference_ID = target_ID - residual.decode().float()
        squared_errors.append(float(difference_ID.double().square().sum()))
    return Encoded(center_ID, residuals, squared_errors)


def alternating_center(
    aligned_NID: Tensor, codec: type[EncodedResidual], *, keep: float, dtype: torch.dtype
) -> Encoded:
    """C ← mean over k of (T_k W_k − decode(R_k)), repeated while the error falls.

    Given the decoded residuals that mean is the best centre; the best round is returned, so the
    result is never worse than the plain barycentre's.
    """
    best = _encode(aligned_NID, aligned_NID.mean(0).to(dtype), codec, keep=keep, dtype=dtype)
    for _ in range(_MAX_ALTERNATIONS):
        decoded = torch.stack([residual.decode().float() for residual in best.residuals])
        center_ID = (aligned_NID - decoded).mean(0).to(dtype)
        trial = _encode(aligned_NID, center_ID, codec, keep=keep, dtype=dtype)
        gained = sum(best.squared_errors) - sum(trial.squared_errors)
        enough = gained > _ALTERNATION_GAIN * sum(best.squared_errors)
        if gained > 0:
            best = trial
        if not enough:
            break
    return best


def windowed_center(aligned_NID: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """The centre [I, D] and masks [N, I, D] of kept entries that minimise the squared error.

    At one entry, if m of the N experts drop it, the best they can do is to be m neighbours in
    sorted order, with their mean as centre and their spread S_m as cost (S_1 = 0). Which m each
    entry takes is one budget over the group: minimise Σ S_m subject to Σ (N − m) ≤ keep·N·I·D. One
    multiplier λ per group does that: every entry drops one more expert as long as the (convexified)
    cost of doing so is below λ. λ is the exact order statistic of those costs; of the entries where
    the cost is λ itself (many, if the weights come from a coarse grid) the first ones drop.

    The share kept is at most `keep`, and short of it by less than one entry's N values, except that
    where dropping costs nothing (equal experts, or keep > (N − 1)/N) no byte is spent.
    """
    count = aligned_NID.shape[0]
    entries = aligned_NID[0].numel()
    flat = aligned_NID.reshape(count, entries)
    kept_at_most = int(keep * count * entries)
    # One expert per entry is dropped for free: the centre is its value.
    drops = (count - 1) * entries - kept_at_most
    # Costs are taken in units of the largest entry, so that no scale of weights underflows.
    scale = float(aligned_NID.abs().max()) or 1.0
    multiplier, at_multiplier = 0.0, 0
    if drops > 0:
        multiplier, at_multiplier = _order_statistic(flat, drops, scale)
    if multiplier == 0:
        at_multiplier = flat.numel()

    center = torch.empty(entries)
    masks = torch.empty(count, entries, dtype=torch.bool)
    for chunk in _chunks(entries):
        center[chunk], masks[:, chunk], taken = _windows_at(
            flat[:, chunk], multiplier, at_multiplier, scale
        )
        at_multiplier -= taken
    return center.view_as(aligned_NID[0]), masks.view_as(aligned_NID)


def _chunks(entries: int) -> Iterator[slice]:
    for start in range(0, entries, _CHUNK_ENTRIES):
        yield slice(start, min(start + _CHUNK_ENTRIES, entries))


def _window_costs(sorted_NC: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Least spread of m neighbours and where that window starts, for m = 1 … N: both [N, C].

    In float64 and units of scale²: the difference of sums below cancels. A spread that is rounding
    of the values themselves counts as none.
    """
    count = sorted_NC.shape[0]
    centred_NC = sorted_NC.double() / scale
    free_C = _FREE * centred_NC.abs().amax(0).square()
    centred_NC -= centred_NC.mean(0)
    zero = torch.zeros_like(centred_NC[:1])
    sums = torch.cat([zero, centred_NC.cumsum(0)])
    squares = torch.cat([zero, centred_NC.square().cumsum(0)])
    costs, starts = torch.zeros_like(centred_NC), torch.zeros_like(centred_NC, dtype=torch.int64)
    for m in range(2, count + 1):
        spreads = squares[m:] - squares[:-m] - (sums[m:] - sums[:-m]).square() / m
        spread_C, starts[m - 1] = spreads.min(0)
        costs[m - 1] = spread_C.where(spread_C > free_C, 0.0)
    return costs, starts


def _convex_steps(costs_NC: Tensor) -> Tensor:
    """Slopes [N − 1, C] of the lower convex hull of m ↦ S_m: the price of each further drop.

    They are the isotonic regression of S_{m+1} − S_m, in max-min form: slope i is the largest over
    a ≤ i of the least mean step from a to any b ≥ i.
    """
    count = costs_NC.shape[0]
    slopes = torch.full_like(costs_NC[1:], -torch.inf)
    for a in range(count - 1):
        least = torch.full_like(costs_NC[0], torch.inf)
        for b in range(count - 1, a, -1):
            least = torch.minimum(least, (costs_NC[b] - costs_NC[a]) / (b - a))
            slopes[b - 1] = torch.maximum(slopes[b - 1], least)
    return slopes.clamp_(min=0).float()


def _windows_at(
    values_NC: Tensor, multiplier: float, at_multiplier: int, scale: float
) -> tuple[Tensor, Tensor, int]:
    """Centre [C] and kept mask [N, C] of a chunk, and how many steps that cost λ it has taken.

    at_multiplier: how many of those are to be taken; the last entry may take more, for part of its
    steps would leave it off the convex hull.
    """
    sorted_NC, order_NC = values_NC.sort(0)
    costs, starts = _window_costs(sorted_NC, scale)
    steps = _convex_steps(costs)
    tied_C = (steps == multiplier).sum(0)
    tied_C *= tied_C.cumsum(0) - tied_C < at_multiplier
    dropped_C = 1 + (steps < multiplier).sum(0) + tied_C
    start_C = starts.gather(0, (dropped_C - 1).unsqueeze(0)).squeeze(0)
    rank_N1 = torch.arange(values_NC.shape[0]).unsqueeze(1)
    window_NC = (rank_N1 >= start_C) & (rank_N1 < start_C + dropped_C)
    # Where one value alone is dropped, the mean is that value to the last bit.
    center_C = ((sorted_NC * window_NC).sum(0, dtype=torch.float64) / dropped_C).float()
    kept_NC = torch.empty_like(window_NC).scatter_(0, order_NC, ~window_NC)
    return center_C, kept_NC, int(tied_C.sum())


def _order_statistic(flat_NE: Tensor, rank: int, scale: float) -> tuple[float, int]:
    """The rank-th smallest (from 1) step cost over all entries, exactly, in bounded memory.

    Also returns which one it is (from 1) among its equals.

    The bits of non-negative floats order as integers, so two histograms of 16 bits each find it;
    the costs are computed again for the second rather than kept.
    """
    prefix = None
    for shift in (16, 0):
        histogram = torch.zeros(1 << 16, dtype=torch.int64)
        for chunk in _chunks(flat_NE.shape[1]):
            costs, _ = _window_costs(flat_NE[:, chunk].sort(0).values, scale)
            bits = _convex_steps(costs).view(torch.int32).flatten()
            if prefix is not None:
                bits = bits[(bits >> 16) == prefix]
            histogram += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16)
        cumulative = histogram.cumsum(0)
        bucket = int(torch.searchsorted(cumulative, rank))
        rank -= int(cumulative[bucket] - histogram[bucket])
        prefix = bucket if prefix is None else (prefix << 16) | bucket
    return float(torch.tensor(prefix, dtype=torch.int32).view(torch.float32)), rank
