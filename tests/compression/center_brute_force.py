"""The least possible errors of small groups, by trying every mask of every entry."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
from torch import Tensor


def least_errors(experts: Tensor) -> list[float]:
    """For each number of kept entries, the least squared error of any masks and any centre.

    Entries are independent except for the budget they share.
    """
    least = {0: 0.0}
    for values in experts.double().flatten(1).T.numpy():
        totals: dict[int, float] = {}
        options = enumerate(_least_spreads(values))
        for (kept, error), (more, spread) in product(least.items(), list(options)):
            totals[kept + more] = min(totals.get(kept + more, np.inf), error + spread)
        least = totals
    return [least[kept] for kept in sorted(least)]


def single_price_budgets(experts: Tensor) -> list[int]:
    """Numbers of kept values that one price for all entries leads to, without ties.

    At each price, every entry keeps the number of values that minimises spread + price · kept.
    """
    # One value of each entry drops for free.
    options = [_least_spreads(v)[:-1] for v in experts.double().flatten(1).T.numpy()]
    options = [np.array(option) for option in options]
    slopes = {
        (option[a] - option[b]) / (b - a)
        for option in options
        for a in range(len(option))
        for b in range(a + 1, len(option))
    }
    prices = sorted(slopes | {0.0})
    between = [(a + b) / 2 for a, b in pairwise(prices) if b - a > 1e-6]
    kept = {
        sum(int(np.argmin(option + price * np.arange(len(option)))) for option in options)
        for price in [*between, prices[-1] + 1]
    }
    return sorted(kept)


def _least_spreads(values: np.ndarray) -> list[float]:
    """For each number of kept values of one entry, the least spread of the dropped ones."""
    least = [np.inf] * (len(values) + 1)
    for mask in product((False, True), repeat=len(values)):
        dropped = values[~np.array(mask)]
        spread = ((dropped - dropped.mean()) ** 2).sum() if dropped.size else 0.0
        least[sum(mask)] = min(least[sum(mask)], spread)
    return least
