"""Restoring and whole MLPs of the Triton backend, against the reference and float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmoe_dist.codecs import PrunedMatrix
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.kernels.reference import ReferenceBackend
from tests.kernels.mlp_problems import MlpCase, assert_outputs, outputs
from tests.kernels.problems import Case, Expert, Problem, restored
from tests.kernels.triton_runs import (
    CENTER_LAYOUTS,
    CUT,
    DTYPES,
    lay_out,
    memory_of,
    mlp,
    restore,
    with_dropped_copies,
)

# --- Restoring ---


def expected_rows(problem: Problem, columns: int, first_column: int = 0) -> torch.Tensor:
    """Restored by the reference: some columns of the used rows of the first expert."""
    return restored(ReferenceBackend(problem.layer), problem, 0, columns, first_column)


@given(
    experts=st.builds(
        Expert,
        center=st.sampled_from([None, 0]),
        share=st.sampled_from([0.0, 0.3, 1.0]),
        wide_offsets=st.booleans(),
    ),
    center=st.sampled_from(CENTER_LAYOUTS),
    whole_words=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    rows=st.tuples(st.integers(1, 9), st.sampled_from([0, 0, 5])),
    columns=st.sampled_from(
        [(7, 0, 7), (64, 0, 64), (99, 33, 65), (99, 97, 2), (160, 32, 64), (70, 5, 1)]
    ),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=12)
def test_restored_rows_equal_the_reference(
    run, experts, center, whole_words, dtype, rows, columns, seed
):
    D, first_column, count = columns
    case = Case(
        rows=rows[0],
        hidden=D // 2,
        inputs=1,
        extra=D % 2,
        experts=(experts,),
        first_row=rows[1],
        last_rows=rows[1],
        seed=seed,
    )
    problem = lay_out(case.build(dtype), (center,), (whole_words,))
    # The memory around the output has to stay as it is.
    expected = torch.full((rows[0] + 2, count + 3), 7.0, dtype=dtype)
    out = expected.clone()[1:-1, 2:-1]
    expected[1:-1, 2:-1] = expected_rows(problem, count, first_column)

    found = run(restore, problem.layer, out, 0, rows[1], first_column)

    cuts = run.is_interpreted and experts.center is not None and dtype == torch.bfloat16
    torch.testing.assert_close(
        memory_of(found).view_as(expected), expected, rtol=CUT if cuts else 0, atol=0
    )


@pytest.mark.parametrize("first_column", [0, 20, 2500])
def test_long_rows_are_restored_from_both_ends(run, first_column):
    problem = Case(rows=5, hidden=1000, extra=1).build(torch.float32)
    expected = expected_rows(problem, 3001 - first_column, first_column)

    found = run(restore, problem.layer, torch.empty_like(expected), first_column=first_column)

    assert torch.equal(found, expected)


def test_rows_are_restored_into_columns(run):
    problem = Case(rows=5, hidden=50, inputs=1).build(torch.float32)

    found = run(restore, problem.layer, torch.empty(100, 5).T)

    assert torch.equal(found, expected_rows(problem, 100))


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_each_expert_is_restored_with_its_own_centre(run, expert):
    experts = (Expert(center=1), Expert(center=None), Expert(center=0))
    problem = Case(rows=3, hidden=20, experts=experts).build(torch.float32)
    expected = restored(ReferenceBackend(problem.layer), problem, expert, 60)

    assert torch.equal(run(restore, problem.layer, torch.empty(3, 60), expert), expected)


def test_both_halves_of_wide_offsets_count(run):
    case = Case(
        rows=5, hidden=38, inputs=1, extra=1, experts=(Expert(center=None, wide_offsets=True),)
    )
    problem = case.build(torch.float32)
    residual = problem.layer.residuals[0]
    # Offsets beyond 32 bits would need gigabytes of values, but negative ones also use both halves.
    tensors = residual.tensors() | {
        "values": residual.values[3:],
        "row_offsets": residual.row_offsets - 3,
    }
    shifted = PrunedMatrix((5, 77), tensors, torch.float32)

    found = run(restore, replace(problem.layer, residuals=(shifted,)), torch.empty(5, 77))

    assert torch.equal(found, expected_rows(problem, 77))


def test_restoring_no_columns_does_nothing(run):
    layer = Case(rows=3, hidden=4, inputs=1).build(torch.float32).layer

    assert run(restore, layer, torch.empty(3, 0)).shape == (3, 0)


def test_sums_are_rounded_to_the_dtype_of_the_weights_before_that_of_the_output(run):
    problem = Case(rows=5, hidden=11).build(torch.float16)

    found = run(restore, problem.layer, torch.empty(5, 33))

    assert torch.equal(found, expected_rows(problem, 33).float())


# --- Whole MLPs ---

# Experts of one centre, and of several centres or none.
ONE_CENTER = (Expert(copies=9), Expert(copies=0), Expert(copies=5))
SEVERAL_CENTERS = (*ONE_CENTER, Expert(center=None, copies=3), Expert(center=1, copies=2))


@pytest.mark.parametrize(
    ("dtype", "share_center"),
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)],
    ids=["float32-shared", "float32-tiled", "bfloat16-shared"],
)
@pytest.mark.parametrize("experts", [ONE_CENTER, SEVERAL_CENTERS], ids=["one", "several"])
def test_mlps_are_exact(run, dtype, share_center, experts):
    case = MlpCase(Case(rows=13, hidden=50, tokens=9, experts=experts, gap=3))
    problem = with_dropped_copies(case.build(dtype), 4)

    found = run(mlp, problem, share_center)

    assert_outputs(found, outputs(case.build(dtype), share_center=share_center))


def test_bfloat16_mlps_add_centre_and_residual(run):
    if run.is_interpreted:
        pytest.skip("the interpreter cuts off bits instead of rounding")
    problem = MlpCase(Case(rows=80, hidden=50, tokens=9, experts=ONE_CENTER)).build(torch.bfloat16)

    found = run(mlp, problem, share_center=False)

    assert_outputs(found, outputs(problem, share_center=False))


@pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])
def test_many_rows_are_multiplied_in_blocks(run, share_center):
    case = MlpCase(Case(rows=70, hidden=9, inputs=1, tokens=4, experts=(Expert(copies=4),)))
    problem = case.build(torch.float32)

    found = run(mlp, problem, share_center, product_bytes=1)

    assert_outputs(found, outputs(problem, share_center=share_center))


@pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])
def test_row_biases_are_added(run, share_center):
    problem = Case(rows=5, hidden=20, extra=2, tokens=9, experts=SEVERAL_CENTERS).build(
        torch.float32
    )
    problem = problem._replace(
        layer=replace(problem.layer, shape=ExpertShape(5, 20, row_bias=True))
    )
    expected = ReferenceBackend(problem.layer).mlp(problem.routed, share_center=share_center)

    found = run(mlp, problem, share_center)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])
def test_mlps_without_copies_give_zeros(run, share_center, tokens):
    experts = (Expert(copies=0), Expert(copies=0))
    problem = Case(rows=4, hidden=20, tokens=tokens, experts=experts).build(torch.float32)

    assert torch.equal(run(mlp, problem, share_center), torch.zeros(tokens, 20))


def test_equal_mlps_give_equal_bits(run):
    # Each token has several copies with the same centre.
    experts = tuple(Expert(copies=6) for _ in range(4))
    problem = Case(rows=9, hidden=20, tokens=6, experts=experts).build(torch.float32)

    assert torch.equal(run(mlp, problem, True), run(mlp, problem, True))
