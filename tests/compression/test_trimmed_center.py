"""The trimmed centre of large groups, against the exact centre and the barycentre."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resmoe_dist.compression.center import (
    MAX_EXACT_EXPERTS,
    joint_center,
    trimmed_center,
    windowed_center,
)
from tests.compression.center_cases import error_around, in_stored_order


def _heavy_tailed(experts: Tensor) -> Tensor:
    return experts * experts.abs()


by_tails = pytest.mark.parametrize(
    "tails", [torch.clone, _heavy_tailed], ids=["gaussian", "heavy tailed"]
)


@by_tails
@pytest.mark.parametrize("noise", [0.3, 1.0, None], ids=["near", "far", "unrelated"])
def test_trimmed_centre_is_nearly_as_good_as_the_exact_one(tails, noise):
    experts = tails(torch.randn(72, 24, 32))
    if noise is not None:
        experts = torch.randn(24, 32) + noise * experts
    group = in_stored_order(experts)

    trimmed = joint_center(group, 0.25, torch.float32, max_exact_experts=0)
    exact = joint_center(group, 0.25, torch.float32, max_exact_experts=72)

    assert error_around(experts, trimmed, 0.25) <= 1.01 * error_around(experts, exact, 0.25)


@by_tails
@pytest.mark.parametrize("keep", [0.0, 0.05, 0.25, 0.5, 0.9])
def test_trimmed_centre_is_never_worse_than_the_barycentre(tails, keep):
    for count in (65, 128):
        for noise in (0.2, 1.0, 3.0):
            experts = torch.randn(12, 18) + noise * tails(torch.randn(count, 12, 18))
            experts[:, :3] = 0

            found = joint_center(in_stored_order(experts), keep, torch.float32)

            plain = error_around(experts, experts.double().mean(0), keep)
            assert error_around(experts, found, keep) <= plain * (1 + 1e-6)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(MAX_EXACT_EXPERTS, windowed_center), (MAX_EXACT_EXPERTS + 1, trimmed_center)],
)
def test_number_of_experts_decides_between_exact_and_trimmed_centre(count, expected):
    group = in_stored_order(torch.randn(count, 8, 9))

    found = joint_center(group, 0.25, torch.float32)

    assert torch.equal(found, expected(group, 0.25, torch.float32))
    assert not torch.equal(
        windowed_center(group, 0.25, torch.float32), trimmed_center(group, 0.25, torch.float32)
    )
