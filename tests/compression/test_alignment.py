"""Alignment methods against brute force over permutations, planted permutations, and POT."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import ot
import pytest
import torch

from resmoe_dist.compression.alignment import ALIGNERS, align
from tests.compression.random_groups import (
    GROUP_KINDS,
    assert_permutations,
    paper_objective,
    random_group,
)


@pytest.mark.parametrize("method", ALIGNERS)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_returns_permutations_and_their_objective(method, count, dtype):
    experts = torch.randn(count, 17, 6).to(dtype)

    found = align(experts, method)

    assert found.permutations_EI.shape == (count, 17)
    assert_permutations(found.permutations_EI, 17)
    expected = paper_objective(experts, found.permutations_EI)
    assert found.objective == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("method", ALIGNERS)
def test_applying_an_alignment_reorders_the_rows_of_each_expert(method):
    experts = torch.randn(3, 8, 4)

    found = align(experts, method)

    for k, perm in enumerate(found.permutations_EI.tolist()):
        expected = torch.stack([experts[k, row] for row in perm])
        assert torch.equal(found.apply(experts)[k], expected)


def test_method_none_leaves_rows_in_stored_order():
    assert align(torch.randn(3, 5, 4), "none").permutations_EI.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("method", ["loo", "pot"])
@pytest.mark.parametrize("count", [2, 5, 8])
def test_planted_permutations_are_recovered(method, count):
    base = torch.randn(40, 16)
    planted = torch.stack([torch.randperm(40) for _ in range(count)])
    experts = torch.stack([base[perm] + 0.05 * torch.randn(40, 16) for perm in planted])

    found = align(experts, method).permutations_EI

    # The row of the common base that each aligned row came from must be the same in every expert.
    origins = planted.gather(1, found)
    assert torch.equal(origins, origins[:1].expand(count, -1))


def test_two_experts_are_aligned_optimally():
    experts = torch.randn(2, 6, 3)

    least = min(
        paper_objective(experts, torch.tensor([range(6), perm])) for perm in permutations(range(6))
    )

    assert align(experts).objective == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_reported_objective_scales_with_the_weights(scale):
    experts = torch.randn(5, 20, 9)

    found = align(experts * scale)

    assert found.objective == pytest.approx(scale**2 * align(experts).objective, rel=1e-6)


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_mean_of_pots_alignment_is_pots_barycentre(kind):
    generator = torch.Generator().manual_seed(1)
    weights = np.full(24, 1 / 24)
    for count in (2, 3, 8):
        experts = random_group(kind, count, 24, 10, generator)
        points = [expert.double().numpy() for expert in experts]
        barycentre, log = ot.lp.free_support_barycenter(
            points, [weights] * count, X_init=points[0].copy(), b=weights, log=True
        )
        assert log["displacement_square_norms"][-1] <= 1e-7  # converged

        aligned = align(experts, "pot").apply(experts)

        np.testing.assert_allclose(aligned.double().numpy().mean(0), barycentre, atol=1e-6)


@pytest.mark.parametrize("method", ["loo", "none"])
@pytest.mark.parametrize("kind", ["equal", "zeros", "zero rows", "one row"])
def test_degenerate_experts_are_aligned(method, kind):
    experts = torch.randn(1, 12, 5).repeat(3, 1, 1)
    if kind == "zeros":
        experts.zero_()
    elif kind == "zero rows":
        experts[:, ::2] = 0
    elif kind == "one row":
        experts = torch.randn(3, 1, 5)

    found = align(experts, method)

    assert_permutations(found.permutations_EI, experts.shape[1])
    least = paper_objective(experts, torch.arange(experts.shape[1]).repeat(3, 1))
    assert found.objective == pytest.approx(least, rel=1e-6, abs=1e-12)


def test_ot_fusion_follows_the_input_projections_alone():
    # Columns 0 and 1 are a permutation of the first expert's, columns 2 and 3 another one.
    inputs_I2, outputs_I2 = torch.randn(6, 2), 10 * torch.randn(6, 2)
    order_I = torch.tensor([3, 0, 5, 1, 4, 2])
    first_ID = torch.cat([inputs_I2, outputs_I2], dim=1)
    second_ID = torch.cat([inputs_I2[order_I], outputs_I2.flip(0)], dim=1)

    found = align(
        torch.stack([first_ID, second_ID]), "ot_fusion", input_columns=torch.tensor([0, 1])
    )

    first_I, second_I = found.permutations_EI
    assert torch.equal(inputs_I2[first_I], inputs_I2[order_I][second_I])
    aligned = found.apply(torch.stack([first_ID, second_ID]))
    # The objective is that of whole rows.
    expected = float((aligned - aligned.mean(0)).square().sum() / 2)
    assert found.objective == pytest.approx(expected, rel=1e-5)
