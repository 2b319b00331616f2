"""Alignment against the paper's objective in float64, brute force over permutations, and POT."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.compression import alignment
from resmoe_dist.compression.alignment import ALIGNERS, align, objective_of
from resmoe_dist.compression.assignment import best_assignment

seeds = st.integers(0, 2**32 - 1)
GROUPS = ["unrelated", "related", "far", "upcycled", "half"]


def _objective(experts: Tensor, perms: Tensor) -> float:
    """Paper 001, equation 4, as it is written."""
    aligned = np.stack([experts[k].double().numpy()[perm] for k, perm in enumerate(perms)])
    center = aligned.mean(0)
    return sum(np.linalg.norm(expert - center) ** 2 for expert in aligned) / len(experts)


def _is_permutation(perm: Tensor, rows: int) -> bool:
    return sorted(perm.tolist()) == list(range(rows))


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


@given(count=st.integers(1, 6), rows=st.integers(1, 12), seed=seeds)
@settings(deadline=None)
def test_the_objective_is_that_of_the_paper(count, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randn(count, rows, 5, generator=generator)
    perms = torch.stack([torch.randperm(rows, generator=generator) for _ in range(count)])

    expected = _objective(experts, perms)

    assert objective_of(experts, perms) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_objective_of_nearly_equal_experts_survives_cancellation():
    experts = 1 + 1e-4 * torch.randn(4, 30, 20)
    perms = torch.arange(30).repeat(4, 1)

    assert objective_of(experts, perms) == pytest.approx(_objective(experts, perms), rel=1e-6)


@pytest.mark.parametrize("entries", [1, 100, 1000])
def test_the_objective_is_that_of_the_paper_in_blocks_of_any_size(monkeypatch, entries):
    experts = torch.randn(3, 17, 6)
    perms = torch.stack([torch.randperm(17) for _ in range(3)])
    monkeypatch.setattr(alignment, "_BLOCK_ENTRIES", entries)

    assert objective_of(experts, perms) == pytest.approx(_objective(experts, perms), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("small_rows", [512, 0], ids=["few rows", "many rows"])
def test_the_scale_of_the_weights_does_not_change_the_alignment(monkeypatch, scale, small_rows):
    monkeypatch.setattr(alignment, "_SMALL_ROWS", small_rows)
    experts = torch.randn(5, 20, 9)

    found = align(experts * scale)

    # Compared by what it costs: rounding may decide between equals.
    assert _objective(experts, found.permutations_NI) == pytest.approx(
        align(experts).objective, rel=1e-6
    )
    assert found.objective == pytest.approx(scale**2 * align(experts).objective, rel=1e-6)


@pytest.mark.parametrize("method", ALIGNERS)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_returns_permutations_and_their_objective(method, count, dtype):
    experts = torch.randn(count, 17, 6).to(dtype)

    found = align(experts, method)

    assert found.permutations_NI.shape == (count, 17)
    assert all(_is_permutation(perm, 17) for perm in found.permutations_NI)
    expected = _objective(experts, found.permutations_NI)
    assert found.objective == pytest.approx(expected, rel=1e-6, abs=1e-9)


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

    assert align(experts).objective == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("small_rows", [512, 0], ids=["few rows", "many rows"])
def test_more_sweeps_never_raise_the_objective(monkeypatch, small_rows):
    monkeypatch.setattr(alignment, "_SMALL_ROWS", small_rows)
    falls = 0
    for trial in range(8):
        generator = torch.Generator().manual_seed(trial)
        experts = torch.randn(5, 30, 4, generator=generator)
        objectives = []
        for sweeps in range(4):
            monkeypatch.setattr(alignment, "_SWEEPS", sweeps)
            objectives.append(align(experts).objective)
        assert objectives == sorted(objectives, reverse=True)
        falls += objectives[0] > objectives[-1]
    # With many rows a sweep that promises too little is not made.
    assert falls >= 6


@given(
    kind=st.sampled_from(GROUPS),
    count=st.integers(3, 6),
    rows=st.integers(1, 20),
    columns=st.integers(1, 8),
    seed=seeds,
)
@settings(deadline=None, max_examples=50)
def test_sweeps_from_any_permutations_never_raise_the_objective(kind, count, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = _group(kind, count, rows, columns, generator)
    start = torch.stack([torch.randperm(rows, generator=generator) for _ in range(count)])

    found = alignment._descend(experts, start, best_assignment)

    assert all(_is_permutation(perm, rows) for perm in found)
    assert _objective(experts, found) <= _objective(experts, start) * (1 + 1e-6)


@pytest.mark.parametrize("kind", GROUPS)
def test_with_many_rows_ending_early_costs_little(monkeypatch, kind):
    experts = _group(kind, 6, 300, 40, torch.Generator().manual_seed(0))
    monkeypatch.setattr(alignment, "_SMALL_ROWS", 0)

    early = align(experts).objective

    monkeypatch.setattr(alignment, "_SWEEP_GAIN", 0.0)
    # Each of two sweeps may forgo a thousandth, and what others would have gained after it.
    assert early <= 1.004 * align(experts).objective


def test_with_many_rows_related_experts_are_aligned_with_one_assignment_each(monkeypatch):
    monkeypatch.setattr(alignment, "_SMALL_ROWS", 0)
    assigned = []

    def assign(target_ID: Tensor, expert_ID: Tensor) -> Tensor:
        assigned.append(1)
        return best_assignment(target_ID, expert_ID)

    base = torch.randn(50, 30)
    experts = torch.stack([base[torch.randperm(50)] for _ in range(6)])
    experts += 0.1 * torch.randn_like(experts)

    found = ALIGNERS["loo"](experts, assign)

    assert len(assigned) == 5
    assert _objective(experts, found) == pytest.approx(align(experts, "pot").objective, rel=1e-6)


@pytest.mark.parametrize("entries", [64, 1 << 22])
def test_the_gain_of_a_step_is_what_the_scores_gain(monkeypatch, entries):
    monkeypatch.setattr(alignment, "_BLOCK_ENTRIES", entries)
    target, expert = torch.randn(2, 90, 20)
    old, new = torch.randperm(90), torch.randperm(90)
    new[30:50] = old[30:50]

    found = alignment._gain(target, expert, old, new)

    scores = target.double().numpy() @ expert.double().numpy().T
    rows = np.arange(90)
    expected = (scores[rows, new.numpy()] - scores[rows, old.numpy()]).sum()
    assert found == pytest.approx(expected, rel=1e-5)


def test_no_step_gains_more_than_was_promised_of_all_rows():
    target, expert = torch.randn(2, 90, 20)
    old = torch.randperm(90)

    at_most = alignment._gain_at_most(target, expert, old)

    new = best_assignment(target, expert)
    scores = target.double().numpy() @ expert.double().numpy().T
    free = (scores.max(1) - scores[np.arange(90), old.numpy()]).sum()
    assert at_most == pytest.approx(free, rel=1e-5)
    assert alignment._gain(target, expert, old, new) <= at_most


@pytest.mark.parametrize("kind", GROUPS)
def test_leave_one_out_never_ends_above_pot(kind):
    # Few columns make it hard: from one start alone, one in twenty of these ends above.
    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 4, 5, 8, 12, 16):
        for rows, columns in ((8, 2), (16, 2), (16, 6), (33, 20)):
            for _ in range(3 if rows < 33 else 1):
                experts = _group(kind, count, rows, columns, generator)
                found, reference = align(experts, "loo"), align(experts, "pot")
                assert found.objective <= reference.objective * (1 + 1e-6), (count, rows, columns)


def test_leave_one_out_is_below_pot_on_unrelated_experts_with_many_rows():
    # More rows than get a second start.
    experts = torch.randn(3, alignment._SMALL_ROWS + 8, 64)

    assert align(experts, "loo").objective < 0.99 * align(experts, "pot").objective


@pytest.mark.parametrize("kind", GROUPS)
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

    assert all(_is_permutation(perm, experts.shape[1]) for perm in found.permutations_NI)
    least = _objective(experts, torch.arange(experts.shape[1]).repeat(3, 1))
    assert found.objective == pytest.approx(least, rel=1e-6, abs=1e-12)
