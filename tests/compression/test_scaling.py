"""The power-of-two scale: close to the largest magnitude, and exact to divide by."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.compression.scaling import power_of_two_scale


@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 0.7, 1.0, 3e38])
@pytest.mark.parametrize("sign", [-1, 1])
def test_scaled_values_and_their_squares_are_exact_and_finite(magnitude, sign):
    matrix = torch.rand(20, 30) * magnitude * sign

    scale = power_of_two_scale(matrix)

    scaled = matrix / scale
    assert float(scaled.abs().max()) <= 1
    assert magnitude < 2**-100 or float(scaled.abs().max()) >= 0.5
    assert torch.equal((scaled.double() * scale), matrix.double())


def test_scale_of_zeros_can_be_inverted_in_float32():
    scale = power_of_two_scale(torch.zeros(3, 4))

    assert torch.isfinite(1 / torch.tensor(scale))
