"""Leave-one-out descent: monotone, early stops, and its result against POT's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.compression.alignment import align
from resmoe_dist.compression.assignment import best_assignment
from resmoe_dist.compression.descent import DescentTuning, align_leave_one_out, descend
from tests.compression.random_groups import (
    GROUP_KINDS,
    assert_permutations,
    paper_objective,
    random_group,
)

# With small_rows=0 every group is treated as one with many rows.
by_small_rows = pytest.mark.parametrize("small_rows", [512, 0], ids=["few rows", "many rows"])


def _objective(experts: Tensor, **tuning: float) -> float:
    """The objective after `align_leave_one_out`."""
    perms = align_leave_one_out(experts, best_assignment, DescentTuning(**tuning))
    return paper_objective(experts, perms)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@by_small_rows
def test_alignment_does_not_depend_on_the_scale_of_the_weights(scale, small_rows):
    experts = torch.randn(5, 20, 9)

    found = _objective(experts * scale, small_rows=small_rows)

    # Objectives are compared because rounding may decide between equal permutations.
    expected = scale**2 * _objective(experts, small_rows=small_rows)
    assert found == pytest.approx(expected, rel=1e-6)


@by_small_rows
def test_more_sweeps_never_raise_the_objective(small_rows):
    falls = 0
    for trial in range(8):
        generator = torch.Generator().manual_seed(trial)
        experts = torch.randn(5, 30, 4, generator=generator)
        objectives = [
            _objective(experts, small_rows=small_rows, max_sweeps=sweeps) for sweeps in range(4)
        ]
        assert objectives == sorted(objectives, reverse=True)
        falls += objectives[0] > objectives[-1]
    # With many rows, a sweep that gains too little is skipped.
    assert falls >= 6


@given(
    kind=st.sampled_from(GROUP_KINDS),
    count=st.integers(3, 6),
    rows=st.integers(1, 20),
    columns=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=50)
def test_sweeps_from_any_permutations_never_raise_the_objective(kind, count, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = random_group(kind, count, rows, columns, generator)
    start = torch.stack([torch.randperm(rows, generator=generator) for _ in range(count)])

    found = descend(experts, start, best_assignment, max_sweeps=2)

    assert_permutations(found, rows)
    assert paper_objective(experts, found) <= paper_objective(experts, start) * (1 + 1e-6)


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_stopping_early_with_many_rows_costs_little(kind):
    experts = random_group(kind, 6, 300, 40, torch.Generator().manual_seed(0))

    early = _objective(experts, small_rows=0)

    # Each of two sweeps may lose a thousandth, and later experts what they would have gained.
    assert early <= 1.004 * _objective(experts, small_rows=0, min_sweep_gain=0.0)


def test_with_many_rows_related_experts_need_one_assignment_each():
    assigned = []

    def assign(target_ID: Tensor, expert_ID: Tensor) -> Tensor:
        assigned.append(1)
        return best_assignment(target_ID, expert_ID)

    base = torch.randn(50, 30)
    experts = torch.stack([base[torch.randperm(50)] for _ in range(6)])
    experts += 0.1 * torch.randn_like(experts)

    found = align_leave_one_out(experts, assign, DescentTuning(small_rows=0))

    assert len(assigned) == 5
    expected = align(experts, "pot").objective
    assert paper_objective(experts, found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_descent_never_ends_above_pot(kind):
    # Few columns are the hard case: from one start alone, 1 of 20 of these groups ends above.
    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 4, 5, 8, 12, 16):
        for rows, columns in ((8, 2), (16, 2), (16, 6), (33, 20)):
            for _ in range(3 if rows < 33 else 1):
                experts = random_group(kind, count, rows, columns, generator)
                found, reference = align(experts, "loo"), align(experts, "pot")
                assert found.objective <= reference.objective * (1 + 1e-6), (count, rows, columns)


def test_descent_is_below_pot_on_unrelated_experts_with_many_rows():
    # Too many rows for a second start.
    experts = torch.randn(3, DescentTuning().small_rows + 8, 64)

    assert align(experts, "loo").objective < 0.99 * align(experts, "pot").objective
