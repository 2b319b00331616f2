"""Drop prices and window means against brute force in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.compression.windows import (
    drop_prices,
    drops_per_entry,
    num_priced_drops,
    window_means,
)

seeds = st.integers(0, 2**32 - 1)


def _spreads(values: np.ndarray, drops: int) -> list[tuple[float, float]]:
    """Spread and mean of every window of `drops` values in sorted order."""
    ordered = np.sort(values.astype(np.float64))
    windows = [ordered[i : i + drops] for i in range(len(ordered) - drops + 1)]
    return [(((window - window.mean()) ** 2).sum(), window.mean()) for window in windows]


def _hull_slopes(values: np.ndarray) -> list[float]:
    """Slopes of the lower convex hull of m ↦ least spread of m values, one for each step of m."""
    points = [(m, min(_spreads(values, m))[0]) for m in range(1, len(values) + 1)]
    hull: list[tuple[int, float]] = []
    for x, y in points:
        # Andrew's monotone chain.
        while len(hull) > 1:
            (x1, y1), (x2, y2) = hull[-2:]
            if (y2 - y1) * (x - x2) < (y - y2) * (x2 - x1):
                break
            hull.pop()
        hull.append((x, y))
    slopes: list[float] = []
    for (x1, y1), (x2, y2) in pairwise(hull):
        slopes += [(y2 - y1) / (x2 - x1)] * (x2 - x1)
    return slopes


def _values(kind: str, count: int, entries: int, seed: int = 0) -> Tensor:
    """Values [E, C] of one of KINDS."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, entries, generator=generator)
    if kind == "coarse":
        return (2 * values).round()
    if kind == "heavy tailed":
        return values**5
    if kind == "clusters":
        return values * 0.01 + torch.randint(3, (count, entries), generator=generator)
    if kind == "outliers":
        # Small spreads next to values seven orders of magnitude larger.
        large = torch.rand(count, entries, generator=generator) < 0.3
        return torch.where(large, 1e4 * values, 1e-3 * values)
    assert kind == "gaussian"
    return values


KINDS = ["gaussian", "coarse", "heavy tailed", "clusters", "outliers"]
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 16, 33])
def test_prices_are_the_slopes_of_the_convex_hull(kind, count):
    values = _values(kind, count, 40)

    prices = drop_prices(values)

    expected = np.array([_hull_slopes(column) for column in values.T.numpy()]).T
    assert prices.shape == (count - 1, 40)
    # Values within a cluster differ by a hundredth, and float32 rounds relative to the whole value.
    rounding = 2e-3 if kind == "clusters" else 2e-5
    np.testing.assert_allclose(prices.numpy(), expected, rtol=rounding, atol=0)


@given(count=st.integers(1, 12), seed=seeds, kind=st.sampled_from(KINDS))
@settings(deadline=None)
def test_prices_are_ascending_and_nonnegative(count, seed, kind):
    prices = drop_prices(_values(kind, count, 20, seed))

    assert bool((prices >= 0).all())
    assert bool((prices.diff(dim=0) >= 0).all())


def test_single_expert_has_no_prices():
    assert drop_prices(torch.randn(1, 7)).shape == (0, 7)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -1e-6, 1e4])
def test_equal_values_cost_exactly_zero(value):
    prices = drop_prices(torch.full((9, 4), value))

    assert not prices.any()


def test_equal_values_in_two_clusters_cost_zero_until_a_window_spans_both():
    # Three of one value and two of another, each inexact in binary.
    values = torch.tensor([0.1, 0.7, 0.1, 0.1, 0.7]).unsqueeze(1)

    prices = drop_prices(values)

    assert prices[:2].flatten().tolist() == [0, 0]
    assert bool((prices[2:] > 0).all())


def test_prices_do_not_depend_on_the_order_of_the_experts():
    values = torch.randn(6, 50)

    assert torch.equal(drop_prices(values[torch.randperm(6)]), drop_prices(values))


@every_kind
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_mean_is_the_tightest_windows(kind, count):
    values = _values(kind, count, 60)
    drops = torch.randint(1, count + 1, (60,))

    found = window_means(values, drops)

    for column, m, mean in zip(values.T.numpy(), drops.tolist(), found.tolist(), strict=True):
        options = _spreads(column, m)
        # Any of the windows whose spreads are equal up to rounding.
        tolerance = 1e-6 * np.abs(column).max()
        least = min(options)[0] * (1 + 1e-5)
        tightest = [option_mean for spread, option_mean in options if spread <= least]
        assert min(abs(mean - option) for option in tightest) <= tolerance


@every_kind
def test_outliers_do_not_reduce_the_precision_of_other_means(kind):
    values = _values(kind, 6, 80)
    drops = torch.full((80,), 3)

    found = window_means(values, drops).numpy()

    expected = np.array([min(_spreads(column, 3))[1] for column in values.T.numpy()])
    within = np.array([np.sort(np.abs(column))[2] for column in values.T.numpy()])
    if kind == "outliers":
        small = within < 1e-2
        assert small.sum() > 20
        np.testing.assert_allclose(found[small], expected[small], rtol=0, atol=1e-9)
    elif kind != "coarse":
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@given(
    count=st.integers(1, 6),
    entries=st.integers(1, 30),
    seed=seeds,
    multiplier=st.integers(0, 3),
    ties=st.integers(0, 40),
)
@settings(deadline=None)
def test_drops_are_all_prices_below_the_multiplier_and_the_given_number_of_ties(
    count, entries, seed, multiplier, ties
):
    generator = torch.Generator().manual_seed(seed)
    prices = torch.randint(4, (count - 1, entries), generator=generator).float().sort(0).values

    drops = drops_per_entry(prices, float(multiplier), ties)

    expected, left = [], ties
    for column in prices.T.tolist():
        below, tied = (sum(p < multiplier for p in column), column.count(multiplier))
        # Entries take all their ties, until there are enough.
        tied = tied if left > 0 else 0
        left -= tied
        expected.append(1 + below + tied)
    assert drops.tolist() == expected


@pytest.mark.parametrize("keep", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_priced_drops_are_all_values_but_the_budget_and_one_free_drop_per_entry(keep, count):
    dropped = count * 100 - int(keep * count * 100)

    assert num_priced_drops(keep, count, 100) == dropped - 100


def test_arguments_are_not_changed():
    values = torch.randn(5, 20)
    before = values.clone()

    prices = drop_prices(values)
    drops_per_entry(prices, float(prices.median()), 1)
    window_means(values, torch.full((20,), 3))

    assert torch.equal(values, before)
