"""The best centre where every entry of every expert is kept or dropped on its own.

At one entry, if m of the N experts drop it, the best they can do is to be m neighbours in sorted
order, with their mean as centre and their spread S_m as cost (S_1 = 0). Which m each entry takes is
one budget over the group: minimise Σ S_m subject to Σ (N − m) ≤ keep·N·I·D. One multiplier λ does
that: every entry drops one more expert as long as the (convexified) price of doing so is below λ,
and λ is the order statistic of all prices that makes the budget.

Given that centre, the entries to keep are those furthest from it: which ones, the codec's caller
finds from the residuals as they will be stored.

Legend: N experts of the group, C entries.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def drops_for(keep: float, count: int, entries: int) -> int:
    """How many prices are paid: all but ⌊keep·N·entries⌋ values drop, and one of N for free."""
    return (count - 1) * entries - int(keep * count * entries)


def drop_prices(values_NC: Tensor) -> Tensor:
    """Prices [N − 1, C] of each further drop at every entry, in order, from N values each.

    The slopes of the lower convex hull of m ↦ S_m, m = 1 … N, by isotonic regression in max-min
    form: slope i is the largest over a ≤ i of the least mean step from a to any b ≥ i.
    """
    count = values_NC.shape[0]
    costs_NC = _window_costs(_sorted(values_NC))
    prices = torch.zeros_like(costs_NC[1:])
    least, step = torch.empty_like(costs_NC[0]), torch.empty_like(costs_NC[0])
    for a in range(count - 1):
        least.fill_(torch.inf)
        for b in range(count - 1, a, -1):
            torch.sub(costs_NC[b], costs_NC[a], out=step).mul_(1 / (b - a))
            torch.minimum(least, step, out=least)
            torch.maximum(prices[b - 1], least, out=prices[b - 1])
    return prices


def window_means(values_NC: Tensor, drops_C: Tensor) -> Tensor:
    """Mean [C] of the tightest `drops_C` (1 … N) of the N values at each entry."""
    mean_C = torch.empty_like(values_NC[0])
    for m, (means, spreads) in enumerate(_windows(_sorted(values_NC)), start=1):
        best_C, least_C = means[0], spreads[0]
        for window_C, spread_C in zip(means[1:], spreads[1:], strict=True):
            best_C = torch.where(spread_C < least_C, window_C, best_C)
            least_C = torch.minimum(spread_C, least_C)
        mean_C = torch.where(drops_C == m, best_C, mean_C)
    return mean_C


def drops_at(prices_NC: Tensor, multiplier: float, at_multiplier: int) -> Tensor:
    """How many experts drop each entry [C].

    at_multiplier: how many prices of exactly λ are to be paid; the first entries pay, and the last
    one may pay more, for part of its steps would leave it off the convex hull.
    """
    tied_C = (prices_NC == multiplier).sum(0)
    tied_C *= tied_C.cumsum(0) - tied_C < at_multiplier
    return 1 + (prices_NC < multiplier).sum(0) + tied_C


def _windows(sorted_NC: Tensor):
    """For m = 1 … N: mean and spread of each window of m neighbours, both [N − m + 1, C].

    Each window is the one before and a value more. All terms of a spread are positive: nothing
    cancels, and equal values have none. The tensors are reused: valid until the next ones.
    """
    count = sorted_NC.shape[0]
    means, spreads = sorted_NC.clone(), torch.zeros_like(sorted_NC)
    away = torch.empty_like(sorted_NC)
    yield means, spreads
    for m in range(1, count):
        means, spreads, away = means[:-1], spreads[:-1], away[:-1]
        torch.sub(sorted_NC[m:], means, out=away)
        means.add_(away, alpha=1 / (m + 1))
        spreads.addcmul_(away, away, value=m / (m + 1))
        yield means, spreads


def _window_costs(sorted_NC: Tensor) -> Tensor:
    """Least spread of m neighbours, m = 1 … N: [N, C]."""
    costs = torch.empty_like(sorted_NC)
    for m, (_, spreads) in enumerate(_windows(sorted_NC)):
        torch.amin(spreads, 0, out=costs[m])
    return costs


def _sorted(values_NC: Tensor) -> Tensor:
    """Each entry's values in order: a network of minima and maxima, many times a sort's speed."""
    rows = list(values_NC.clone().unbind(0))
    spare = torch.empty_like(rows[0])
    for low, high in _comparators(len(rows)):
        torch.minimum(rows[low], rows[high], out=spare)
        torch.maximum(rows[low], rows[high], out=rows[high])
        rows[low], spare = spare, rows[low]
    return torch.stack(rows)


@lru_cache
def _comparators(count: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge network (Batcher 1968) for `count` values: pairs to put in order."""
    pairs = []
    merged = 1
    while merged < count:
        distance = merged
        while distance >= 1:
            for start in range(distance % merged, count - distance, 2 * distance):
                for i in range(start, min(start + distance, count - distance)):
                    if i // (2 * merged) == (i + distance) // (2 * merged):
                        pairs.append((i, i + distance))
            distance //= 2
        merged *= 2
    return tuple(pairs)
