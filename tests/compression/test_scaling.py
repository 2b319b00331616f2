"""The power-of-two scale: close to the largest magnitude, and exact to divide by."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.compression.scaling import power_of_two_scale


@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 0.7, 1.0, 3e38])
@pytest.mark.parametrize("sign", [-1, 1])
def test_scaled_values_are_below_two_and_exact(magnitude, sign):
    matrix = torch.rand(20, 30) * magnitude * sign

    scale = power_of_two_scale(matrix)

    scaled = matrix / scale
    largest = float(scaled.abs().max())
    assert largest < 2
    # Below 2⁻¹⁰⁰ the scale is not reduced further.
    assert magnitude < 2**-100 or largest >= 0.5
    assert torch.equal(scaled.double() * scale, matrix.double())


def test_scale_of_zeros_can_be_inverted_in_float32():
    scale = power_of_two_scale(torch.zeros(3, 4))

    assert torch.isfinite(1 / torch.tensor(scale))
