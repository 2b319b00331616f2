"""What all kernels are held against, itself against float64 in NumPy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmoe_dist.kernels import reference
from tests.kernels.mlp_problems import MLP_CASES, assert_outputs, outputs
from tests.kernels.problems import (
    CASES,
    assert_equal_numbers,
    assert_sums,
    columns_of,
    dense,
    restored,
    sums_in,
    sums_out,
)

every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@every_dtype
@given(case=CASES, data=st.data())
@settings(deadline=None)
def test_the_reference_restores_the_rounded_sum(dtype, case, data):
    first, columns = columns_of(case, data)
    for rows in case.build(dtype).jobs:
        expected = torch.from_numpy(dense(rows, case.columns)[:, first : first + columns])

        assert_equal_numbers(restored(reference, rows, columns, first), expected.to(dtype))


@every_dtype
@given(case=CASES)
@settings(deadline=None)
def test_the_reference_multiplies_with_the_rounded_sum(dtype, case):
    problem = case.build(dtype)

    assert_sums(problem.project_in(reference), sums_in(case, problem))
    assert_sums(problem.project_out(reference), sums_out(case, problem))


@every_dtype
@given(case=MLP_CASES)
@settings(deadline=None)
def test_the_reference_runs_whole_mlps(dtype, case):
    problem = case.build(dtype)

    assert_outputs(reference.mlp(*problem), outputs(case, problem))
