"""The optimal centre if each entry of each expert may be kept or dropped independently.

At one entry, suppose that m of the E experts drop their value. The squared error is least if they
are m neighbours in sorted order (a *window*) and the centre is their mean. The error is then the
window's spread, the sum of its squared deviations from its mean. S_m is the least spread of any
window of m values; S_1 = 0.

How many experts drop each entry is one budget over the whole group: minimise Σ S_m subject to
Σ (E − m) ≤ keep·E·I·D. A single Lagrange multiplier λ solves it. The *price* of a further drop is
the slope of the lower convex hull of S at m. Each entry drops one more expert as long as the price
is below λ. λ is the order statistic of all prices that meets the budget.

Given this centre, the entries to keep are those furthest from it. The caller selects them, from the
residuals as they will be stored.

Legend: E experts of the group, I rows, D columns, C entries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from resmoe_dist.compression.sorting import sort_columns


def num_priced_drops(keep: float, experts: int, entries: int) -> int:
    """How many drops with a price are needed so that ⌊keep·E·entries⌋ values are kept.

    The first drop at each entry is free. Negative if fewer drops than that are needed.
    """
    return (experts - 1) * entries - int(keep * experts * entries)


def drop_prices(values_EC: Tensor) -> Tensor:
    """The price of each further drop at each entry, ascending: [E − 1, C].

    These are the slopes of the lower convex hull of m ↦ S_m, m = 1 … E, computed by isotonic
    regression in max-min form: slope i is the maximum over a ≤ i of the minimum over b > i of
    (S_b − S_a) / (b − a).
    """
    count = values_EC.shape[0]
    spread_EC = _least_spreads(sort_columns(values_EC))
    prices = torch.zeros_like(spread_EC[1:])
    least, slope = torch.empty_like(spread_EC[0]), torch.empty_like(spread_EC[0])
    for a in range(count - 1):
        least.fill_(torch.inf)
        for b in range(count - 1, a, -1):
            torch.sub(spread_EC[b], spread_EC[a], out=slope).mul_(1 / (b - a))
            torch.minimum(least, slope, out=least)
            torch.maximum(prices[b - 1], least, out=prices[b - 1])
    return prices


def window_means(values_EC: Tensor, drops_C: Tensor) -> Tensor:
    """Mean [C] of the tightest window of `drops_C` (1 … E) values at each entry."""
    mean_C = torch.empty_like(values_EC[0])
    for m, (means, spreads) in enumerate(_windows(sort_columns(values_EC)), start=1):
        best_C, least_C = means[0], spreads[0]
        for window_C, spread_C in zip(means[1:], spreads[1:], strict=True):
            best_C = torch.where(spread_C < least_C, window_C, best_C)
            least_C = torch.minimum(spread_C, least_C)
        mean_C = torch.where(drops_C == m, best_C, mean_C)
    return mean_C


def drops_per_entry(prices_EC: Tensor, multiplier: float, ties: int) -> Tensor:
    """How many experts drop each entry [C], given the prices [E − 1, C] and λ.

    ties: how many drops with a price of exactly λ are made, taken from the first entries on. An
    entry makes all its drops of that price or none, because a part of them would not be on the
    convex hull. So the last entry may exceed `ties`.
    """
    tied_C = (prices_EC == multiplier).sum(0)
    tied_C *= tied_C.cumsum(0) - tied_C < ties
    return 1 + (prices_EC < multiplier).sum(0) + tied_C


def _windows(sorted_EC: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For m = 1 … E: mean and spread of each window of m values, both [E − m + 1, C].

    Each window extends one of the step before by one value. A spread is a sum of positive terms, so
    nothing cancels, and windows of equal values have spread 0. The next step overwrites the yielded
    tensors.
    """
    count = sorted_EC.shape[0]
    means, spreads = sorted_EC.clone(), torch.zeros_like(sorted_EC)
    deviation = torch.empty_like(sorted_EC)
    yield means, spreads
    for m in range(1, count):
        means, spreads, deviation = means[:-1], spreads[:-1], deviation[:-1]
        torch.sub(sorted_EC[m:], means, out=deviation)
        means.add_(deviation, alpha=1 / (m + 1))
        spreads.addcmul_(deviation, deviation, value=m / (m + 1))
        yield means, spreads


def _least_spreads(sorted_EC: Tensor) -> Tensor:
    """S_m for m = 1 … E: [E, C]."""
    least_EC = torch.empty_like(sorted_EC)
    for m, (_, spreads) in enumerate(_windows(sorted_EC)):
        torch.amin(spreads, 0, out=least_EC[m])
    return least_EC
