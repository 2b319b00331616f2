"""Centres that minimise a weighted error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmoe_dist.compression.blocks import EntryWeights
from tests.compression.center_brute_force import least_errors, single_price_budgets
from tests.compression.center_cases import (
    center_and_masks,
    in_stored_order,
    random_weights,
    small_groups,
    squared_error,
    weight_matrix,
)


@pytest.mark.parametrize("count", [1, 2, 5, 70])
@pytest.mark.parametrize("keep", [0.0, 0.25, 1.0])
def test_equal_experts_have_no_residuals_with_weights(count, keep):
    expert = torch.randn(9, 14)
    weights = random_weights(9, 14, slice(5, 14))

    center_ID, masks = center_and_masks(in_stored_order(expert.repeat(count, 1, 1), weights), keep)

    assert not masks.any()
    torch.testing.assert_close(center_ID, expert, rtol=1.2e-7, atol=1e-44)


@given(experts=small_groups(), data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_weighted_error_is_optimal_for_budgets_that_one_price_reaches(experts, data, seed):
    _, rows, columns = experts.shape
    output_columns = slice(*sorted(data.draw(st.tuples(*[st.integers(0, columns)] * 2))))
    weights = random_weights(rows, columns, output_columns, seed)
    matrix = weight_matrix(weights)
    weighted = experts * matrix
    kept = data.draw(st.sampled_from(single_price_budgets(weighted)))
    keep = (kept + 0.5) / experts.numel()

    center_ID, masks = center_and_masks(in_stored_order(experts, weights), keep)

    least = least_errors(weighted)[kept]
    assert int(masks.sum()) <= kept
    error = squared_error(weighted, center_ID * matrix, masks)
    assert error == pytest.approx(least, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("count", [5, 66], ids=["exact", "trimmed"])
def test_weights_are_equivalent_to_scaling_the_experts(count):
    experts = torch.randn(count, 11, 13)
    # Powers of two do not round.
    column_D = 2.0 ** torch.randint(-3, 4, (13,))
    weights = EntryWeights(column_D, 2.0 ** torch.randint(-3, 4, (11,)), slice(4, 9))
    matrix = weight_matrix(weights)

    center_ID, masks = center_and_masks(in_stored_order(experts, weights), 0.3)

    expected_center, expected_masks = center_and_masks(in_stored_order(experts * matrix), 0.3)
    assert torch.equal(center_ID * matrix, expected_center)
    assert torch.equal(masks, expected_masks)
