"""Alignment against brute force over permutations, SciPy on squared distances, and POT itself."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from resmoe_dist.compression import assignment
from resmoe_dist.compression.assignment import ALIGNERS, align, best_assignment, objective_of

seeds = st.integers(0, 2**32 - 1)


def _objective(experts: Tensor, perms: Tensor) -> float:
    """Paper 001, equation 4, as it is written."""
    aligned = np.stack([experts[k].double().numpy()[perm] for k, perm in enumerate(perms)])
    center = aligned.mean(0)
    return sum(np.linalg.norm(expert - center) ** 2 for expert in aligned) / len(experts)


def _distances(target: Tensor, expert: Tensor) -> np.ndarray:
    """Squared distances of every row of one to every row of the other, in float64."""
    a, b = target.double().numpy(), expert.double().numpy()
    return np.array([[((x - y) ** 2).sum() for y in b] for x in a])


def _is_permutation(perm: Tensor, rows: int) -> bool:
    return sorted(perm.tolist()) == list(range(rows))


@given(count=st.integers(1, 6), rows=st.integers(1, 12), seed=seeds)
@settings(deadline=None)
def test_the_objective_is_that_of_the_paper(count, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randn(count, rows, 5, generator=generator)
    perms = torch.stack([torch.randperm(rows, generator=generator) for _ in range(count)])

    expected = _objective(experts, perms)

    assert objective_of(experts, perms) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_objective_of_nearly_equal_experts_survives_cancellation():
    experts = 1 + 1e-4 * torch.randn(4, 30, 20)
    perms = torch.arange(30).repeat(4, 1)

    assert objective_of(experts, perms) == pytest.approx(_objective(experts, perms), rel=1e-6)


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
    kind=st.sampled_from(["unrelated", "permuted", "coarse", "duplicates"]),
)
@settings(deadline=None, max_examples=60)
def test_the_best_assignment_costs_what_scipy_finds_on_squared_distances(rows, columns, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    target, expert = torch.randn(2, rows, columns, generator=generator)
    if kind == "permuted":
        noise = torch.randn(rows, columns, generator=generator)
        expert = target[torch.randperm(rows, generator=generator)] + 0.1 * noise
    elif kind == "coarse":
        target, expert = target.round(), expert.round()
    elif kind == "duplicates":
        target[rows // 2 :] = target[0]
        expert[: rows // 3] = expert[-1]

    found = best_assignment(target, expert)

    cost = _distances(target, expert)
    least = cost[linear_sum_assignment(cost)].sum()
    assert _is_permutation(found, rows)
    assert cost[np.arange(rows), found.numpy()].sum() == pytest.approx(least, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_the_scale_of_the_weights_does_not_change_the_alignment(scale):
    experts = torch.randn(3, 20, 9)

    found = align(experts * scale)

    # Compared by what it costs: rounding may decide between equals.
    assert _objective(experts, found.permutations_NI) == pytest.approx(
        align(experts).objective, rel=1e-6
    )


@pytest.mark.parametrize("method", ALIGNERS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_method_returns_permutations_and_their_objective(method, count):
    experts = torch.randn(count, 17, 6)

    found = align(experts, method)

    assert found.permutations_NI.shape == (count, 17)
    assert all(_is_permutation(perm, 17) for perm in found.permutations_NI)
    expected = _objective(experts, found.permutations_NI)
    assert found.objective == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("method", ALIGNERS)
def test_applying_an_alignment_reorders_the_rows_of_each_expert(method):
    experts = torch.randn(3, 8, 4)

    found = align(experts, method)

    for k, perm in enumerate(found.permutations_NI.tolist()):
        expected = torch.stack([experts[k, row] for row in perm])
        assert torch.equal(found.apply(experts)[k], expected)


def test_no_alignment_leaves_rows_as_stored():
    assert align(torch.randn(3, 5, 4), "none").permutations_NI.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("method", ["loo", "pot"])
@pytest.mark.parametrize("count", [2, 5, 8])
def test_planted_permutations_are_recovered(method, count):
    base = torch.randn(40, 16)
    planted = torch.stack([torch.randperm(40) for _ in range(count)])
    experts = torch.stack([base[perm] + 0.05 * torch.randn(40, 16) for perm in planted])

    found = align(experts, method).permutations_NI

    # Which row of the common base each aligned row came from: the same one in every expert.
    origins = planted.gather(1, found)
    assert torch.equal(origins, origins[:1].expand(count, -1))


def test_two_experts_are_aligned_at_the_optimum():
    experts = torch.randn(2, 6, 3)

    least = min(
        _objective(experts, torch.tensor([range(6), perm])) for perm in permutations(range(6))
    )

    assert align(experts).objective == pytest.approx(least, rel=1e-9)


def test_more_sweeps_never_raise_the_objective(monkeypatch):
    for trial in range(10):
        generator = torch.Generator().manual_seed(trial)
        experts = torch.randn(5, 30, 4, generator=generator)
        objectives = []
        for sweeps in range(6):
            monkeypatch.setattr(assignment, "_SWEEPS", sweeps)
            objectives.append(align(experts).objective)
        assert objectives == sorted(objectives, reverse=True)
        assert objectives[0] > objectives[-1]


def _group(kind: str, count: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Unrelated experts, noisy permuted copies (near, far, half replaced), or upcycled ones."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "unrelated":
        return normal(count, rows, columns)
    noise = {"related": 0.7, "far": 1.5, "upcycled": 0.3, "half": 0.2}[kind]
    experts = normal(rows, columns) + noise * normal(count, rows, columns)
    if kind == "half":
        replaced = torch.rand(count, rows, 1, generator=generator) < 0.5
        experts = experts.where(~replaced, normal(count, rows, columns))
    if kind == "upcycled":
        return experts
    orders = [torch.randperm(rows, generator=generator) for _ in range(count)]
    return torch.stack([expert[order] for expert, order in zip(experts, orders, strict=True)])


@pytest.mark.parametrize("kind", ["unrelated", "related", "far", "upcycled", "half"])
def test_leave_one_out_never_ends_above_pot(kind):
    # Few columns make it hard: from one start alone, one in twenty of these ends above.
    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 4, 5, 8, 12, 16):
        for rows, columns in ((8, 2), (16, 2), (16, 6), (33, 20)):
            for _ in range(4 if rows < 33 else 1):
                experts = _group(kind, count, rows, columns, generator)
                found, reference = align(experts, "loo"), align(experts, "pot")
                assert found.objective <= reference.objective * (1 + 1e-6), (count, rows, columns)


def test_leave_one_out_is_below_pot_on_unrelated_experts_with_many_rows():
    # More rows than get a second start.
    experts = torch.randn(3, assignment._TWO_STARTS_ROWS + 8, 64)

    assert align(experts, "loo").objective < 0.99 * align(experts, "pot").objective


@pytest.mark.parametrize("kind", ["unrelated", "related", "far", "upcycled", "half"])
def test_the_mean_of_pots_alignment_is_pots_barycentre(kind):
    generator = torch.Generator().manual_seed(1)
    weights = np.full(24, 1 / 24)
    for count in (2, 3, 8):
        experts = _group(kind, count, 24, 10, generator)
        points = [expert.double().numpy() for expert in experts]
        barycentre, log = ot.lp.free_support_barycenter(
            points, [weights] * count, X_init=points[0].copy(), b=weights, log=True
        )
        assert log["displacement_square_norms"][-1] <= 1e-7  # converged

        aligned = align(experts, "pot").apply(experts)

        np.testing.assert_allclose(aligned.double().numpy().mean(0), barycentre, atol=1e-6)
