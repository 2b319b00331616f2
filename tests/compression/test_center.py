"""The joint centre: brute force on small groups, gains on large ones, degenerate groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compression.center_brute_force import least_errors, single_price_budgets
from tests.compression.center_cases import (
    EIGHTHS,
    center_and_masks,
    error_around,
    in_stored_order,
    small_groups,
    squared_error,
)


@given(experts=small_groups(), data=st.data())
@settings(deadline=None, max_examples=80)
def test_error_is_optimal_for_budgets_that_one_price_reaches(experts, data):
    kept = data.draw(st.sampled_from(single_price_budgets(experts)))

    center_ID, masks = center_and_masks(in_stored_order(experts), (kept + 0.5) / experts.numel())

    least = least_errors(experts)[kept]
    assert int(masks.sum()) <= kept
    assert squared_error(experts, center_ID, masks) == pytest.approx(least, rel=1e-5, abs=1e-9)


@given(experts=small_groups(), keep=EIGHTHS)
@settings(deadline=None, max_examples=100)
def test_error_is_at_most_the_optimum_with_one_entry_less(experts, keep):
    center_ID, masks = center_and_masks(in_stored_order(experts), keep)

    found, least = squared_error(experts, center_ID, masks), least_errors(experts)
    budget = int(keep * experts.numel())
    # One entry may have to drop all its values at once.
    fewer = max(0, budget - len(experts) + 1)
    assert min(least[: budget + 1]) * (1 - 1e-5) - 1e-9 <= found
    assert found <= min(least[: fewer + 1]) * (1 + 1e-5) + 1e-9


@given(experts=small_groups(), keep=EIGHTHS)
@settings(deadline=None, max_examples=100)
def test_number_of_kept_entries_is_the_budget_or_all_nonzero_entries(experts, keep):
    center_ID, masks = center_and_masks(in_stored_order(experts), keep)

    nonzero = int((experts != center_ID).sum())
    assert int(masks.sum()) == min(int(keep * experts.numel()), nonzero)


def test_coarse_weights_use_the_budget_although_most_entries_are_equal():
    # The values of 4-bit floats, the format of gpt-oss.
    grid = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for count in (2, 4, 8):
        experts = grid[torch.randint(8, (count, 40, 50))] * (2 * torch.randint(2, (1, 40, 50)) - 1)

        _, masks = center_and_masks(in_stored_order(experts), 0.25)

        assert int(masks.sum()) == experts.numel() // 4


def test_error_falls_as_more_is_kept():
    experts = torch.randn(5, 20, 30)

    errors = [
        squared_error(experts, *center_and_masks(in_stored_order(experts), n / 40))
        for n in range(41)
    ]

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


@given(experts=small_groups())
@settings(deadline=None)
def test_centre_is_the_mean_if_nothing_is_kept(experts):
    center_ID, masks = center_and_masks(in_stored_order(experts), 0.0)

    assert not masks.any()
    mean = experts.double().mean(0)
    torch.testing.assert_close(center_ID.double(), mean, rtol=1e-6, atol=1e-7)


@given(experts=small_groups(coarse=False), data=st.data())
@settings(deadline=None, max_examples=60)
def test_centre_is_the_mean_of_the_dropped_values(experts, data):
    kept = data.draw(st.sampled_from(single_price_budgets(experts)))

    center_ID, masks = center_and_masks(in_stored_order(experts), (kept + 0.5) / experts.numel())

    for row, column in np.ndindex(*center_ID.shape):
        dropped = experts[:, row, column].double()[~masks[:, row, column]]
        assert len(dropped)
        assert float(center_ID[row, column]) == pytest.approx(float(dropped.mean()), abs=1e-6)


# Squared error relative to the plain barycentre at the same keep, in percent, by number of experts.
GAUSSIAN_GAINS = {
    2: {0.125: -45, 0.25: -74, 0.5: -100},
    4: {0.125: -26, 0.25: -50, 0.5: -88},
    8: {0.125: -13, 0.25: -28, 0.5: -66},
    16: {0.125: -6, 0.25: -15, 0.5: -43},
}


@pytest.mark.parametrize("count", GAUSSIAN_GAINS)
def test_gains_on_gaussian_experts(count):
    experts = torch.randn(count, 128, 250)

    for keep, percent in GAUSSIAN_GAINS[count].items():
        plain = error_around(experts, experts.double().mean(0), keep)
        joint = squared_error(experts, *center_and_masks(in_stored_order(experts), keep))
        assert 100 * (joint / plain - 1) == pytest.approx(percent, abs=2), keep


@given(
    count=st.sampled_from([*range(1, 10), 70]),
    keep=EIGHTHS,
    value=st.floats(-(2.0**100), 2.0**100, width=32),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_equal_experts_have_no_residuals(count, keep, value, seed):
    expert = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    expert[1, 2] = value

    center_ID, masks = center_and_masks(in_stored_order(expert.repeat(count, 1, 1)), keep)

    assert not masks.any()
    torch.testing.assert_close(center_ID, expert, rtol=1.2e-7, atol=1e-44)


def test_single_expert_is_its_own_centre():
    experts = torch.randn(1, 6, 7)

    for keep in (0.0, 0.3, 1.0):
        center_ID, masks = center_and_masks(in_stored_order(experts), keep)
        assert torch.equal(center_ID, experts[0])
        assert not masks.any()


def test_zero_rows_stay_zero_and_have_no_residuals():
    experts = torch.randn(4, 6, 10)
    experts[:, [0, 3, 5]] = 0

    center_ID, masks = center_and_masks(in_stored_order(experts), 0.3)

    assert not masks[:, [0, 3, 5]].any()
    assert not center_ID[[0, 3, 5]].any()
    assert int(masks.sum()) == int(0.3 * 240)


@pytest.mark.parametrize("count", [3, 70])
def test_zero_experts_have_a_zero_centre_and_no_residuals(count):
    center_ID, masks = center_and_masks(in_stored_order(torch.zeros(count, 4, 5)), 0.5)

    assert not center_ID.any()
    assert not masks.any()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-66, 2.0**66, 2.0**100])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [4, 66])
def test_scaling_the_weights_scales_the_centre_and_keeps_the_masks(scale, keep, count):
    experts = torch.randn(count, 16, 12)

    center_ID, masks = center_and_masks(in_stored_order(experts * scale), keep)

    expected_center, expected_masks = center_and_masks(in_stored_order(experts), keep)
    assert torch.equal(masks, expected_masks)
    assert torch.equal(center_ID, expected_center * scale)


@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e9, 1e15])
@pytest.mark.parametrize("count", [2, 4])
def test_one_huge_weight_does_not_change_the_centre_of_other_entries(outlier, count):
    experts = 0.02 * torch.randn(count, 16, 12)
    expected, _ = center_and_masks(in_stored_order(experts), 0.25)
    experts[0, 0, 0] = outlier

    center_ID, masks = center_and_masks(in_stored_order(experts), 0.25)

    assert int(masks.sum()) == int(0.25 * experts.numel())
    # The budget of one other entry may change by what the outlier's entry gains or loses.
    assert int((center_ID != expected).sum()) <= 2
