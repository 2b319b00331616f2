"""Prices of drops against the lower convex hull of brute-force spreads, in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.compression import windows
from resmoe_dist.compression.windows import drop_prices, drops_at, drops_for, window_means

seeds = st.integers(0, 2**32 - 1)


def _spreads(values: np.ndarray, drops: int) -> list[tuple[float, float]]:
    """Spread and mean of every window of `drops` neighbours in sorted order."""
    ordered = np.sort(values.astype(np.float64))
    windows_of = [ordered[i : i + drops] for i in range(len(ordered) - drops + 1)]
    return [(((window - window.mean()) ** 2).sum(), window.mean()) for window in windows_of]


def _hull_slopes(values: np.ndarray) -> list[float]:
    """Slopes of the lower convex hull of m ↦ least spread of m values, one for each further m."""
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
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, entries, generator=generator)
    if kind == "coarse":
        return (2 * values).round()
    if kind == "heavy tailed":
        return values**5
    if kind == "clusters":
        return values * 0.01 + torch.randint(3, (count, entries), generator=generator)
    if kind == "outliers":
        # Small spreads beside values seven orders larger.
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
    # Within a cluster values differ by less than a thousandth of what float32 rounds relative to.
    rounding = 2e-3 if kind == "clusters" else 2e-5
    np.testing.assert_allclose(prices.numpy(), expected, rtol=rounding, atol=0)


@given(count=st.integers(1, 12), seed=seeds, kind=st.sampled_from(KINDS))
@settings(deadline=None)
def test_prices_are_in_order_and_never_negative(count, seed, kind):
    prices = drop_prices(_values(kind, count, 20, seed))

    assert bool((prices >= 0).all())
    assert bool((prices.diff(dim=0) >= 0).all())


def test_an_expert_alone_has_no_prices():
    assert drop_prices(torch.randn(1, 7)).shape == (0, 7)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -1e-6, 1e4])
def test_equal_values_cost_exactly_nothing(value):
    prices = drop_prices(torch.full((9, 4), value))

    assert not prices.any()


def test_values_that_are_equal_within_clusters_cost_nothing_until_clusters_meet():
    # Three of one value and two of another, each inexact in binary.
    values = torch.tensor([0.1, 0.7, 0.1, 0.1, 0.7]).unsqueeze(1)

    prices = drop_prices(values)

    assert prices[:2].flatten().tolist() == [0, 0]
    assert bool((prices[2:] > 0).all())


def test_the_order_of_the_experts_does_not_matter():
    values = torch.randn(6, 50)

    assert torch.equal(drop_prices(values[torch.randperm(6)]), drop_prices(values))


@every_kind
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_the_mean_is_that_of_the_tightest_window(kind, count):
    values = _values(kind, count, 60)
    drops = torch.randint(1, count + 1, (60,))

    found = window_means(values, drops)

    for column, m, mean in zip(values.T.numpy(), drops.tolist(), found.tolist(), strict=True):
        options = _spreads(column, m)
        # Equal spreads: any of them. Rounding of a spread: the square of that of its values.
        tolerance = 1e-6 * np.abs(column).max()
        least = min(options)[0] * (1 + 1e-5)
        tightest = [option_mean for spread, option_mean in options if spread <= least]
        assert min(abs(mean - option) for option in tightest) <= tolerance


@every_kind
def test_means_of_small_values_are_not_rounded_to_the_precision_of_outliers(kind):
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
    at_multiplier=st.integers(0, 40),
)
@settings(deadline=None)
def test_prices_below_the_multiplier_are_paid_and_as_many_at_it_as_asked_for(
    count, entries, seed, multiplier, at_multiplier
):
    generator = torch.Generator().manual_seed(seed)
    prices = torch.randint(4, (count - 1, entries), generator=generator).float().sort(0).values

    drops = drops_at(prices, float(multiplier), at_multiplier)

    expected, left = [], at_multiplier
    for column in prices.T.tolist():
        below, tied = (sum(p < multiplier for p in column), column.count(multiplier))
        # Whole entries pay, until enough have.
        tied = tied if left > 0 else 0
        left -= tied
        expected.append(1 + below + tied)
    assert drops.tolist() == expected


@pytest.mark.parametrize("keep", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_all_values_but_the_budget_drop_and_one_of_each_entry_drops_for_free(keep, count):
    dropped = count * 100 - int(keep * count * 100)

    assert drops_for(keep, count, 100) == dropped - 100


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("count", range(1, 41))
def test_the_network_sorts(count, coarse):
    values = torch.randn(count, 300)
    values = values.round() if coarse else values

    assert torch.equal(windows._sorted(values), values.sort(0).values)


@pytest.mark.parametrize("count", range(1, 13))
def test_the_network_sorts_all_zeros_and_ones(count):
    # A network that sorts these sorts everything (Knuth, volume 3, theorem Z of 5.3.4).
    ones = torch.arange(2**count).unsqueeze(0) >> torch.arange(count).unsqueeze(1) & 1
    values = ones.float()

    assert torch.equal(windows._sorted(values), values.sort(0).values)


def test_nothing_given_is_changed():
    values = torch.randn(5, 20)
    before = values.clone()

    prices = drop_prices(values)
    drops_at(prices, float(prices.median()), 1)
    window_means(values, torch.full((20,), 3))

    assert torch.equal(values, before)
