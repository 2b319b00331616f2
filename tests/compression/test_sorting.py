"""The sorting network against `torch.sort`."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.compression.sorting import sort_columns


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("count", range(1, 41))
def test_columns_are_sorted(count, coarse):
    values = torch.randn(count, 300)
    values = values.round() if coarse else values

    assert torch.equal(sort_columns(values), values.sort(0).values)


@pytest.mark.parametrize("count", range(1, 13))
def test_columns_of_zeros_and_ones_are_sorted(count):
    # A network that sorts these sorts everything (Knuth, volume 3, theorem Z of 5.3.4).
    ones = torch.arange(2**count).unsqueeze(0) >> torch.arange(count).unsqueeze(1) & 1
    values = ones.float()

    assert torch.equal(sort_columns(values), values.sort(0).values)
