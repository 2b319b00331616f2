"""The half products of the Triton backend, against float64.

Legend: N routed copies.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmoe_dist.kernels.reference import ReferenceBackend
from tests.kernels.problems import Case, Expert, Problem
from tests.kernels.triton_runs import (
    CENTER_LAYOUTS,
    DTYPES,
    check_half_products,
    half_products,
    lay_out,
    with_dropped_copies,
)

EXPERTS = st.builds(
    Expert,
    center=st.sampled_from([None, 0, 1]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    wide_offsets=st.booleans(),
    copies=st.sampled_from([0, 1, 1, 2, 5]),
    repeated=st.just(True),
)


@st.composite
def problems(draw: st.DrawFn, part: str) -> Problem:
    """Small problems; as many centres as experts for part "center"."""
    experts = draw(st.lists(EXPERTS, min_size=2, max_size=4))
    used = 1 + max((-1 if expert.center is None else expert.center) for expert in experts)
    case = Case(
        rows=draw(st.integers(1, 6)),
        hidden=draw(st.sampled_from([1, 5, 8, 31, 32, 33, 64, 130])),
        inputs=draw(st.integers(1, 2)),
        extra=draw(st.integers(0, 2)),
        tokens=5,
        experts=tuple(experts),
        first_row=draw(st.sampled_from([0, 0, 3])),
        last_rows=draw(st.sampled_from([0, 2])),
        unused_centers=len(experts) - used if part == "center" else 0,
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    problem = lay_out(
        case.build(draw(st.sampled_from(DTYPES))),
        draw(st.permutations(CENTER_LAYOUTS).map(tuple)),
        draw(st.sampled_from([(True,), (False,), (True, False)])),
    )
    return with_dropped_copies(problem, draw(st.integers(0, 2)))


@pytest.mark.parametrize("part", ["whole", "residual", "center"])
@given(data=st.data())
@settings(deadline=None, max_examples=7)
def test_half_products_are_exact(run, part, data):
    check_half_products(run, data.draw(problems(part)), part)


def mixed(*copies: int) -> tuple[Expert, ...]:
    """Experts with a centre alone, with a residual alone, and with both."""
    kinds = (
        Expert(share=0.0),
        Expert(center=None),
        Expert(center=1),
        Expert(center=None, wide_offsets=True),
    )
    return tuple(
        replace(kinds[i % 4], copies=count, repeated=True) for i, count in enumerate(copies)
    )


def problem_of(
    *copies: int, rows: int = 5, hidden: int = 40, tokens: int = 5, dtype=torch.float32, **sizes
) -> Problem:
    case = Case(rows=rows, hidden=hidden, tokens=tokens, experts=mixed(*copies), **sizes)
    return case.build(dtype)


BFLOAT16 = {"dtype": torch.bfloat16}
SIZES = {
    "columns in several tiles": problem_of(1, 1, 0, 2, rows=3, hidden=1100),
    "columns in several tiles, many copies": problem_of(9, 1, 0, 2, rows=3, hidden=550, **BFLOAT16),
    "rows in several spans": problem_of(1, 1, rows=40, inputs=1, **BFLOAT16),
    "rows in several spans, many copies": problem_of(20, 7, rows=40),
    "spans in several rounds": problem_of(3, rows=600, hidden=9, inputs=1),
    "copies in several blocks": problem_of(33, 0, 70, 3, **BFLOAT16),
    "few copies in several blocks": problem_of(0, 5, 0, 1, 0, 0, 0, 2, 0),
    "copies in several rounds": problem_of(700, 330, rows=1, hidden=3, inputs=1),
    "tokens without a copy": problem_of(1, 1, 1, 1, tokens=30),
    "no copies": problem_of(0, 0, 0, 0),
    "no rows": problem_of(2, 1, 1, rows=0, last_rows=2),
    "only dropped copies": with_dropped_copies(problem_of(0, 0, 0, 0), 9),
    "dropped copies": with_dropped_copies(problem_of(0, 9, 20, 0), 40),
}


@pytest.mark.parametrize("size", SIZES)
def test_half_products_of_every_size_are_exact(run, size):
    check_half_products(run, SIZES[size], "whole")


FEW_OR_MANY = pytest.mark.parametrize("copies", [(2, 1), (9, 3)], ids=["few", "many"])


@FEW_OR_MANY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_tokens_are_not_rounded_to_the_dtype_of_the_weights(run, copies, dtype):
    problem = problem_of(*copies, dtype=dtype)
    routed = replace(problem.routed, x_RH=torch.randn(5, 40))
    problem = problem._replace(routed=routed, h_NS=torch.randn(sum(copies), 5))

    check_half_products(run, problem, "residual")


@FEW_OR_MANY
def test_equal_calls_give_equal_bits(run, copies):
    problem = problem_of(0, *copies, rows=10)
    again = run(half_products, problem, "whole")

    for found, same in zip(run(half_products, problem, "whole"), again, strict=True):
        assert torch.equal(found, same)


@FEW_OR_MANY
def test_no_entry_of_one_projection_reaches_another(run, copies):
    # A projection ends in the middle of a word: two projections share it.
    ends = [49, 50, 99, 100, 149, 150]
    experts = (Expert(center=None, share=1.0), Expert(share=1.0))
    experts = tuple(
        replace(expert, copies=count, repeated=True)
        for expert, count in zip(experts, copies, strict=True)
    )
    problem = Case(rows=6, hidden=50, extra=2, tokens=5, experts=experts).build(torch.float32)
    for residual in problem.layer.residuals:
        for i, column in enumerate(ends):
            residual.values[152 * i + column] = math.inf
    backend = ReferenceBackend(problem.layer)
    expected = problem.project_in(backend), problem.project_out(backend)

    found = run(half_products, problem, "whole")

    for products, expected_products in zip(found, expected, strict=True):
        finite = expected_products.isfinite()
        assert finite.any() and not finite.all()
        torch.testing.assert_close(
            products, expected_products, rtol=1e-4, atol=1e-4, equal_nan=True
        )
