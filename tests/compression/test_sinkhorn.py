"""Sinkhorn's column prices: they spread the rows' demand over more columns."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.compression.sinkhorn import column_prices


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_with_prices_rows_choose_more_different_columns(scale):
    cost = -scale * torch.randn(300, 40).double() @ torch.randn(300, 40).double().T

    priced = cost - column_prices(cost, block_rows=1024)

    chosen, chosen_before = (len(matrix.argmin(1).unique()) for matrix in (priced, cost))
    assert chosen > 1.2 * chosen_before


@pytest.mark.parametrize("constant", [0.0, 1.0, -1e30, 1e-30])
def test_prices_are_zero_if_all_assignments_cost_the_same(constant):
    cost = torch.full((9, 9), constant, dtype=torch.float64)

    assert not column_prices(cost, block_rows=1024).any()
