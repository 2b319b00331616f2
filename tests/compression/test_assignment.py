"""The best assignment against brute force, and SciPy in float64 on distances or scores."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from resmoe_dist.compression import assignment, certificate
from resmoe_dist.compression.assignment import (
    SOLVERS,
    AssignmentTuning,
    best_assignment,
    check_solver,
)
from resmoe_dist.errors import UserError
from tests.compression.random_pairs import (
    PAIR_KINDS,
    assert_optimal,
    every_kind,
    is_permutation,
    near_ties,
    needs_int8,
    random_pair,
)

seeds = st.integers(0, 2**32 - 1)
# Try the 8-bit certificate for matrices of any size, or never.
CERTIFY = AssignmentTuning(min_int8_multiplications=0)
DO_NOT_CERTIFY = AssignmentTuning(min_int8_multiplications=1 << 60)

every_solver = pytest.mark.parametrize("solver", ["scipy", "lapx"])


def _distances(target: Tensor, expert: Tensor) -> np.ndarray:
    """Squared distance of every target row to every expert row, in float64."""
    a, b = target.double().numpy(), expert.double().numpy()
    return np.array([[((x - y) ** 2).sum() for y in b] for x in a])


@pytest.fixture
def no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a solver is called."""

    def refuse(cost_II: np.ndarray) -> np.ndarray:
        raise AssertionError("a solver was called")

    monkeypatch.setitem(SOLVERS, "scipy", refuse)


@pytest.fixture
def scored_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of target rows of each float product that follows."""
    scored, score_blocks = [], assignment.score_blocks

    def record(target_ID: Tensor, expert_ID: Tensor, block_rows: int):
        scored.append(len(target_ID))
        return score_blocks(target_ID, expert_ID, block_rows)

    for module in (assignment, certificate):
        monkeypatch.setattr(module, "score_blocks", record)
    return scored


@given(rows=st.integers(1, 6), columns=st.integers(1, 4), seed=seeds, spread=st.integers(1, 50))
@settings(deadline=None, max_examples=60)
def test_assignment_equals_brute_force(rows, columns, seed, spread):
    # Small integers: ties and duplicate rows are frequent, and sums are exact.
    generator = torch.Generator().manual_seed(seed)
    target, expert = (
        torch.randint(-spread, spread + 1, (rows, columns), generator=generator).float()
        for _ in range(2)
    )

    found = best_assignment(target, expert)

    cost = _distances(target, expert)
    least = min(sum(cost[i, p] for i, p in enumerate(perm)) for perm in permutations(range(rows)))
    assert is_permutation(found, rows)
    assert sum(cost[i, p] for i, p in enumerate(found.tolist())) == least


@given(
    rows=st.integers(7, 50),
    columns=st.integers(1, 20),
    seed=seeds,
    kind=st.sampled_from(["unrelated", "related", "coarse", "duplicate rows"]),
    tuning=st.sampled_from([CERTIFY, AssignmentTuning()]),
)
@settings(deadline=None, max_examples=60)
def test_assignment_costs_what_scipy_finds_on_squared_distances(rows, columns, seed, kind, tuning):
    target, expert = random_pair(kind, rows, columns, seed)

    found = best_assignment(target, expert, tuning=tuning)

    cost = _distances(target, expert)
    least = cost[linear_sum_assignment(cost)].sum()
    assert is_permutation(found, rows)
    assert cost[np.arange(rows), found.numpy()].sum() == pytest.approx(least, rel=1e-5, abs=1e-5)


@every_kind
def test_assignment_is_optimal_if_8_bits_are_tried_first(kind):
    for seed in range(3):
        target, expert = random_pair(kind, 150, 24, seed)
        assert_optimal(best_assignment(target, expert, tuning=CERTIFY), target, expert)


@every_kind
def test_assignment_is_optimal_on_a_cpu_without_8_bit_products(monkeypatch, kind):
    target, expert = random_pair(kind, 150, 24)
    monkeypatch.setattr(assignment, "supports_int8_products", lambda columns: False)

    assert_optimal(best_assignment(target, expert, tuning=CERTIFY), target, expert)


@needs_int8
def test_related_experts_of_real_size_need_no_solver_and_no_float_products(no_solver, scored_rows):
    # Two blocks of rows, and just large enough for the certificate.
    target, expert = random_pair("related", 1100, 230)
    assert AssignmentTuning().min_int8_multiplications <= 1100 * 1100 * 230

    assert_optimal(best_assignment(target, expert), target, expert)

    assert scored_rows == []


@needs_int8
@pytest.mark.parametrize(
    ("pairs", "scored"), [(20, 40), (150, 300)], ids=["few undecided", "too many undecided"]
)
def test_float_products_decide_the_undecided_rows_or_all_if_too_many(
    no_solver, scored_rows, pairs, scored
):
    target, expert, best = near_ties(rows=300, pairs=pairs)

    found = best_assignment(target, expert, tuning=CERTIFY)

    assert torch.equal(found, best)
    assert scored_rows == [scored]


@every_kind
@pytest.mark.parametrize("tuning", [CERTIFY, DO_NOT_CERTIFY], ids=["8 bits first", "floats only"])
def test_optimum_does_not_depend_on_the_block_size(kind, tuning):
    target, expert = random_pair(kind, 71, 12)
    for block_rows in (1, 7, 33, 70):
        sizes = replace(tuning, block_rows=block_rows, min_sinkhorn_rows=0)
        assert_optimal(best_assignment(target, expert, tuning=sizes), target, expert)


@needs_int8
def test_certificate_does_not_depend_on_the_block_size(no_solver):
    target, expert, best = near_ties(rows=71, pairs=9)

    for block_rows in (1, 7, 33):
        tuning = replace(CERTIFY, block_rows=block_rows)
        assert torch.equal(best_assignment(target, expert, tuning=tuning), best)


@every_kind
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@every_solver
def test_solver_with_sinkhorn_prices_finds_the_optimum(kind, scale, solver):
    if solver == "lapx":
        pytest.importorskip("lap")
    target, expert = random_pair(kind, 60, 12)
    # float16 cannot represent the scaled values.
    target, expert = scale * target, scale * expert.float()

    found = best_assignment(
        target, expert, solver=solver, tuning=AssignmentTuning(min_sinkhorn_rows=0)
    )

    assert_optimal(found, target, expert)


@every_solver
def test_solver_without_prices_finds_the_optimum(solver):
    if solver == "lapx":
        pytest.importorskip("lap")
    tuning = AssignmentTuning(min_sinkhorn_rows=1 << 60)
    for kind in PAIR_KINDS:
        target, expert = random_pair(kind, 60, 12)
        found = best_assignment(target, expert, solver=solver, tuning=tuning)
        assert_optimal(found, target, expert)


def test_missing_solver_is_a_user_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(UserError, match=r"--solver lapx: not installed; run pip install lapx"):
        check_solver("lapx")
    check_solver("scipy")


def test_installed_solver_is_accepted():
    pytest.importorskip("lap")

    check_solver("lapx")
