"""The alignment objective and its change, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmoe_dist.compression.assignment import best_assignment
from resmoe_dist.compression.objective import alignment_objective, gain, gain_bound
from tests.compression.random_groups import paper_objective


@given(count=st.integers(1, 6), rows=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_objective_equals_the_papers(count, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randn(count, rows, 5, generator=generator)
    perms = torch.stack([torch.randperm(rows, generator=generator) for _ in range(count)])

    expected = paper_objective(experts, perms)

    assert alignment_objective(experts, perms) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_objective_of_nearly_equal_experts_does_not_cancel():
    experts = 1 + 1e-4 * torch.randn(4, 30, 20)
    perms = torch.arange(30).repeat(4, 1)

    expected = paper_objective(experts, perms)

    assert alignment_objective(experts, perms) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("block_entries", [1, 100, 1000])
def test_objective_does_not_depend_on_the_block_size(block_entries):
    experts = torch.randn(3, 17, 6)
    perms = torch.stack([torch.randperm(17) for _ in range(3)])

    found = alignment_objective(experts, perms, block_entries=block_entries)

    assert found == pytest.approx(paper_objective(experts, perms), rel=1e-6)


@pytest.mark.parametrize("block_entries", [64, 1 << 22])
def test_gain_is_the_difference_of_the_scores(block_entries):
    target, expert = torch.randn(2, 90, 20)
    old, new = torch.randperm(90), torch.randperm(90)
    new[30:50] = old[30:50]

    found = gain(target, expert, old, new, block_entries=block_entries)

    scores = target.double().numpy() @ expert.double().numpy().T
    rows = np.arange(90)
    expected = (scores[rows, new.numpy()] - scores[rows, old.numpy()]).sum()
    assert found == pytest.approx(expected, rel=1e-5)


def test_gain_bound_is_the_gain_of_free_choice_and_above_the_best_assignments():
    target, expert = torch.randn(2, 90, 20)
    old = torch.randperm(90)

    bound = gain_bound(target, expert, old)

    scores = target.double().numpy() @ expert.double().numpy().T
    free_choice = (scores.max(1) - scores[np.arange(90), old.numpy()]).sum()
    assert bound == pytest.approx(free_choice, rel=1e-5)
    assert gain(target, expert, old, best_assignment(target, expert)) <= bound
