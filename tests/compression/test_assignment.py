"""The best assignment against brute force, and SciPy in float64 on distances or scores."""

from __future__ import annotations

import importlib.util
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from resmoe_dist.compression import assignment
from resmoe_dist.compression.assignment import best_assignment, check_solver
from resmoe_dist.compression.blocks import unit_of
from resmoe_dist.errors import UserError

seeds = st.integers(0, 2**32 - 1)
needs_int8 = pytest.mark.skipif(
    not assignment._multiplies_int8(1), reason="this CPU has no 8-bit products"
)


def _distances(target: Tensor, expert: Tensor) -> np.ndarray:
    """Squared distances of every row of one to every row of the other, in float64."""
    a, b = target.double().numpy(), expert.double().numpy()
    return np.array([[((x - y) ** 2).sum() for y in b] for x in a])


def _is_permutation(perm: Tensor, rows: int) -> bool:
    return sorted(perm.tolist()) == list(range(rows))


def _assert_best(found: Tensor, target: Tensor, expert: Tensor) -> None:
    """That no assignment has larger scores than `found`, up to float32 rounding of the scores."""
    scores = target.double().numpy() @ expert.double().numpy().T
    best = scores[linear_sum_assignment(scores, maximize=True)].sum()
    assert _is_permutation(found, len(target))
    rounding = 1e-6 * np.abs(scores).max(1).sum()
    assert scores[np.arange(len(target)), found.numpy()].sum() >= best - rounding


def _pair(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A target and an expert, of one of `KINDS`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    target, order = normal(rows, columns), torch.randperm(rows, generator=generator)
    if kind == "unrelated":
        return target, normal(rows, columns)
    expert = target[order] + 0.1 * normal(rows, columns)
    if kind == "bfloat16":
        return target, expert.bfloat16()
    if kind == "float16":
        return target, expert.half()
    if kind == "duplicate rows":
        expert[: rows // 3] = expert[-1]
        target[rows // 2 :] = target[0]
    elif kind == "zero rows":
        expert[::3], target[::4] = 0, 0
    elif kind == "zeros":
        expert[:] = 0
    elif kind == "an outlier column":
        expert[:, 1], target[:, 1] = 1000 * expert[:, 1], 1000 * target[:, 1]
    elif kind == "an outlier row":
        expert[order.argmin()], target[0] = 1e6 * expert[order.argmin()], 1e6 * target[0]
    elif kind == "rows of all magnitudes":
        magnitude = 10 ** (10 * torch.rand(rows, 1, generator=generator) - 5)
        target, expert = magnitude * target, magnitude[order] * expert
    elif kind == "coarse":
        target, expert = target.round(), expert.round()
    elif kind == "constant":
        target, expert = torch.ones(rows, columns), torch.full((rows, columns), 2.0)
    else:
        assert kind == "related"
    return target, expert


KINDS = [
    "unrelated",
    "related",
    "bfloat16",
    "float16",
    "duplicate rows",
    "zero rows",
    "zeros",
    "an outlier column",
    "an outlier row",
    "rows of all magnitudes",
    "coarse",
    "constant",
]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def certifies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 8-bit integers are tried at every size."""
    monkeypatch.setattr(assignment, "_CERTIFY_FROM", 0)


@pytest.fixture
def solver_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cost_II: np.ndarray) -> np.ndarray:
        raise AssertionError("a solver was called")

    monkeypatch.setitem(assignment.SOLVERS, "scipy", refuse)


@given(rows=st.integers(1, 6), columns=st.integers(1, 4), seed=seeds, spread=st.integers(1, 50))
@settings(deadline=None, max_examples=60)
def test_the_best_assignment_is_that_of_brute_force(rows, columns, seed, spread):
    # Small integers: ties and duplicate rows are frequent, and sums are exact.
    generator = torch.Generator().manual_seed(seed)
    target, expert = (
        torch.randint(-spread, spread + 1, (rows, columns), generator=generator).float()
        for _ in range(2)
    )

    found = best_assignment(target, expert)

    cost = _distances(target, expert)
    least = min(sum(cost[i, p] for i, p in enumerate(perm)) for perm in permutations(range(rows)))
    assert _is_permutation(found, rows)
    assert sum(cost[i, p] for i, p in enumerate(found.tolist())) == least


@given(
    rows=st.integers(7, 50),
    columns=st.integers(1, 20),
    seed=seeds,
    kind=st.sampled_from(["unrelated", "related", "coarse", "duplicate rows"]),
    certify=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_the_best_assignment_costs_what_scipy_finds_on_squared_distances(
    rows, columns, seed, kind, certify
):
    target, expert = _pair(kind, rows, columns, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "_CERTIFY_FROM", 0 if certify else 1 << 28)
        found = best_assignment(target, expert)

    cost = _distances(target, expert)
    least = cost[linear_sum_assignment(cost)].sum()
    assert _is_permutation(found, rows)
    assert cost[np.arange(rows), found.numpy()].sum() == pytest.approx(least, rel=1e-5, abs=1e-5)


@every_kind
def test_trying_integers_first_finds_the_optimum(certifies, kind):
    for seed in range(3):
        target, expert = _pair(kind, 150, 24, seed)
        _assert_best(best_assignment(target, expert), target, expert)


@every_kind
def test_without_integer_products_the_optimum_is_the_same(certifies, monkeypatch, kind):
    target, expert = _pair(kind, 150, 24)
    monkeypatch.setattr(assignment, "_multiplies_int8", lambda columns: False)

    _assert_best(best_assignment(target, expert), target, expert)


@needs_int8
def test_related_experts_of_real_size_need_no_solver_and_no_float_products(
    solver_is_forbidden, monkeypatch
):
    # Two blocks of rows; just large enough for integers to be tried.
    target, expert = _pair("related", 1100, 230)
    assert assignment._CERTIFY_FROM <= 1100 * 1100 * 230
    monkeypatch.setattr(assignment, "_score_columns", None)

    _assert_best(best_assignment(target, expert), target, expert)


def _near_ties(rows: int, pairs: int, distance: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """target, expert and the best assignment: the target is the expert's rows in another order.

    The first rows of the expert are pairs which differ by a hundredth: far less than 8 bits tell,
    far more than float32 does. All rows have the same norm, so each is its own best partner.
    """
    expert = torch.randn(rows, 64)
    expert[1 : 2 * pairs : 2] = expert[0 : 2 * pairs : 2] + distance * torch.randn(pairs, 64)
    expert = torch.nn.functional.normalize(expert, dim=1)
    best = torch.randperm(rows)
    return expert[best], expert, best


def _rows_scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each of the float products to come is for."""
    scored, products = [], assignment._score_columns

    def record(target_ID: Tensor, expert_ID: Tensor):
        scored.append(len(target_ID))
        return products(target_ID, expert_ID)

    monkeypatch.setattr(assignment, "_score_columns", record)
    return scored


@needs_int8
def test_rows_that_integers_leave_undecided_are_decided_exactly(
    certifies, solver_is_forbidden, monkeypatch
):
    target, expert, best = _near_ties(rows=300, pairs=20)
    scored = _rows_scored(monkeypatch)

    found = best_assignment(target, expert)

    assert torch.equal(found, best)
    assert scored == [40]


@needs_int8
def test_where_most_rows_are_undecided_float_products_decide_all(
    certifies, solver_is_forbidden, monkeypatch
):
    target, expert, best = _near_ties(rows=300, pairs=150)
    scored = _rows_scored(monkeypatch)

    found = best_assignment(target, expert)

    assert torch.equal(found, best)
    assert scored == [300]


@needs_int8
@pytest.mark.parametrize("kind", ["unrelated", "duplicate rows", "zeros", "coarse", "constant"])
def test_nothing_is_certified_where_rows_want_the_same_partner(kind):
    assert assignment._certified_partners(*_pair(kind, 90, 12)) is None


@needs_int8
@every_kind
def test_rounding_changes_scores_by_no_more_than_is_allowed_for(kind):
    target, expert = _pair(kind, 70, 33)

    rounded = [assignment._Rounded(matrix) for matrix in (target, expert)]

    for matrix, found in zip((target, expert), rounded, strict=True):
        exact = matrix.double().numpy() / unit_of(matrix)
        stored = found.integers_ID.double().numpy() * found.scale_I.double().numpy()[:, None]
        assert np.all(np.linalg.norm(exact - stored, axis=1) <= found.error_I.numpy())
        np.testing.assert_allclose(
            found.norm_I.numpy(), np.linalg.norm(stored, axis=1), rtol=1e-6, atol=0
        )


@needs_int8
@pytest.mark.parametrize("exact", ["neither", "target", "expert"])
@pytest.mark.parametrize("columns", [2, 3, 8])
def test_no_row_is_decided_for_another_partner_than_its_best(monkeypatch, exact, columns):
    # Few columns, where the bound is nearly reached, and many partners, of which some nearly tie.
    # Not permutations: these would hide most errors.
    monkeypatch.setattr(assignment, "_is_permutation", lambda partner_I: True)
    monkeypatch.setattr(assignment, "_UNDECIDED_AT_MOST", 1 << 60)
    for _ in range(10):
        target, expert = torch.randn(2, 1000, columns)
        # Along an axis, all of an error of the expert's row counts.
        target[::2, 1:] = 0
        target = target.roll(1, dims=1)
        for name, matrix in (("target", target), ("expert", expert)):
            if name == exact:
                matrix.mul_(40).round_().clamp_(-127, 127)
                matrix[:, 0] = 127

        found = assignment._certified_partners(target, expert)

        scores = target.double() @ expert.double().T
        lost = scores.amax(1) - scores.gather(1, found.unsqueeze(1)).squeeze(1)
        # Undecided rows are decided in float32.
        assert float(lost.max()) <= 1e-6 * float(scores.abs().max())


def test_integers_are_not_used_where_their_sums_could_overflow():
    most = (2**31 - 1) // 127**2

    assert not assignment._multiplies_int8(most + 1)


@every_kind
@pytest.mark.parametrize("certify_from", [0, 1 << 60])
def test_the_size_of_blocks_does_not_change_the_optimum(monkeypatch, kind, certify_from):
    target, expert = _pair(kind, 71, 12)
    monkeypatch.setattr(assignment, "_CERTIFY_FROM", certify_from)
    monkeypatch.setattr(assignment, "_SINKHORN_FROM", 0)
    for block_rows in (1, 7, 33, 70):
        monkeypatch.setattr(assignment, "_BLOCK_ROWS", block_rows)
        _assert_best(best_assignment(target, expert), target, expert)


@needs_int8
def test_blocks_of_any_size_are_certified_alike(certifies, solver_is_forbidden, monkeypatch):
    target, expert, best = _near_ties(rows=71, pairs=9)

    for block_rows in (1, 7, 33):
        monkeypatch.setattr(assignment, "_BLOCK_ROWS", block_rows)
        assert torch.equal(best_assignment(target, expert), best)


@every_kind
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("solver", ["scipy", "lapx"])
def test_a_solver_finds_the_optimum_from_sinkhorns_prices(monkeypatch, kind, scale, solver):
    if solver == "lapx":
        pytest.importorskip("lap")
    target, expert = _pair(kind, 60, 12)
    # float16 has no such numbers.
    target, expert = scale * target, scale * expert.float()
    monkeypatch.setattr(assignment, "_SINKHORN_FROM", 0)

    _assert_best(best_assignment(target, expert, solver=solver), target, expert)


@pytest.mark.parametrize("solver", ["scipy", "lapx"])
def test_a_solver_finds_the_optimum_without_prices(monkeypatch, solver):
    if solver == "lapx":
        pytest.importorskip("lap")
    monkeypatch.setattr(assignment, "_SINKHORN_FROM", 1 << 60)
    for kind in KINDS:
        target, expert = _pair(kind, 60, 12)
        _assert_best(best_assignment(target, expert, solver=solver), target, expert)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_with_sinkhorns_prices_fewer_columns_are_wanted_by_several_rows(scale):
    cost = -scale * torch.randn(300, 40).double() @ torch.randn(300, 40).double().T

    priced = cost - assignment._sinkhorn_prices(cost)

    wanted, wanted_before = (len(matrix.argmin(1).unique()) for matrix in (priced, cost))
    assert wanted > 1.2 * wanted_before


@pytest.mark.parametrize("constant", [0.0, 1.0, -1e30, 1e-30])
def test_where_all_assignments_cost_the_same_nothing_has_a_price(constant):
    cost = torch.full((9, 9), constant, dtype=torch.float64)

    assert not assignment._sinkhorn_prices(cost).any()


def test_a_solver_that_is_not_installed_is_a_user_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(UserError, match=r"--solver lapx: not installed; run pip install lapx"):
        check_solver("lapx")
    check_solver("scipy")


def test_a_solver_that_is_installed_is_accepted():
    pytest.importorskip("lap")

    check_solver("lapx")
