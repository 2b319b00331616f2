"""The reference backend against float64 in NumPy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmoe_dist.kernels.reference import ReferenceBackend
from tests.kernels.mlp_problems import MLP_CASES, assert_outputs, outputs
from tests.kernels.problems import (
    CASES,
    assert_equal_numbers,
    assert_sums,
    dense,
    draw_columns,
    restored,
    sums_in,
    sums_out,
)

every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
every_part = pytest.mark.parametrize("part", ["whole", "residual"])


@every_dtype
@given(case=CASES, data=st.data())
@settings(deadline=None)
def test_restores_the_rounded_sum(dtype, case, data):
    first, columns = draw_columns(case, data)
    problem = case.build(dtype)
    backend = ReferenceBackend(problem.layer)
    for expert in range(problem.layer.num_experts):
        expected = torch.from_numpy(dense(problem, expert)[:, first : first + columns])

        assert_equal_numbers(restored(backend, problem, expert, columns, first), expected.to(dtype))


@every_part
@every_dtype
@given(case=CASES)
@settings(deadline=None)
def test_half_products_are_exact(dtype, part, case):
    problem = case.build(dtype)
    backend = ReferenceBackend(problem.layer)

    assert_sums(problem.project_in(backend, part), sums_in(problem, part))
    assert_sums(problem.project_out(backend, part), sums_out(problem, part))


@every_dtype
@given(case=MLP_CASES)
@settings(deadline=None)
def test_runs_whole_mlps(dtype, case):
    problem = case.build(dtype)

    found = ReferenceBackend(problem.layer).mlp(problem.routed, share_center=False)

    assert_outputs(found, outputs(problem, share_center=False))


@given(case=MLP_CASES)
@settings(deadline=None)
def test_shares_centres(case):
    problem = case.build(torch.float32)

    found = ReferenceBackend(problem.layer).mlp(problem.routed, share_center=True)

    assert_outputs(found, outputs(problem, share_center=True))
