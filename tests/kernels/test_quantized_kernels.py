"""The C++ kernels for quantised layers on every instruction set of this machine, against float64.

Few copies are multiplied in whole numbers of 16 bits (bfloat16) or 31 (float32). Many are
multiplied with rows that were decoded to the layer's dtype.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.kernels import backend_for
from resmoe_dist.kernels.cpu.backend import DTYPES
from resmoe_dist.kernels.cpu.quantized_backend import QuantizedCpuBackend
from resmoe_dist.kernels.reference import ReferenceBackend
from resmoe_dist.routing import RoutedTokens
from tests.kernels.problems import PlainActivation, Problem
from tests.kernels.quantized_problems import (
    CODINGS,
    Coding,
    Outputs,
    QuantizedCase,
    QuantizedExpert,
    assert_close,
    decoded,
    quantized_cases,
    quantized_outputs,
)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_coding = pytest.mark.parametrize(
    "coding", CODINGS, ids=lambda coding: f"{coding.coder}-{coding.bits}"
)
shared_or_not = pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])

# Relative errors in the Euclidean norm. In whole numbers, a token is within 2^-15 of its largest
# entry, and so are activations. Decoded rows, tokens and activations are rounded to 2^-9 each.
FEW = {torch.float32: 5e-6, torch.bfloat16: 1e-3}
MANY = {torch.float32: 5e-6, torch.bfloat16: 1e-2}


@cache
def solved(case: QuantizedCase, dtype: torch.dtype) -> tuple[Problem, Outputs]:
    """A problem and what `mlp` should give. NumPy is slow, and all instruction sets share it."""
    problem = case.build(dtype)
    return problem, quantized_outputs(problem)


def mlp(problem: Problem, *, share_center: bool) -> Tensor:
    return QuantizedCpuBackend(problem.layer).mlp(problem.routed, share_center=share_center)


@shared_or_not
@every_dtype
@given(case=quantized_cases(st.integers(0, 5)))
@settings(deadline=None)
def test_few_copies_are_exact(instruction_set, dtype, share_center, case):
    problem = case.build(dtype)

    found = mlp(problem, share_center=share_center)

    assert_close(found, quantized_outputs(problem), FEW[dtype])


@shared_or_not
@every_dtype
@given(
    case=quantized_cases(st.sampled_from([1, 4, 5, 6, 9, 11, 12, 13, 20, 33])),
    activation=st.sampled_from(["silu", "gelu_tanh", "relu"]),
)
@settings(deadline=None)
def test_any_number_of_copies_is_right(instruction_set, dtype, share_center, case, activation):
    problem = case.build(dtype, activation)

    found = mlp(problem, share_center=share_center)

    assert_close(found, quantized_outputs(problem), MANY[dtype])


@every_coding
@pytest.mark.parametrize("hidden", [96, 515], ids=["rotated", "not rotated"])
@every_dtype
def test_each_coding_is_exact_for_centre_and_residual(instruction_set, dtype, hidden, coding):
    for copies in (1, 2, 3, 4, 5):
        case = QuantizedCase(
            rows=37,
            hidden=hidden,
            tokens=6,
            experts=(QuantizedExpert(coding, copies=copies),),
            center_coding=coding,
            first_row=1,
            last_rows=1,
        )
        problem, expected = solved(case, dtype)

        for share_center in (True, False):
            assert_close(mlp(problem, share_center=share_center), expected, FEW[dtype])


def group(size: int, copies: int) -> tuple[QuantizedExpert, ...]:
    return tuple(
        QuantizedExpert(coding, copies=copies, repeated=True, center=k % 2)
        for k, coding in zip(range(size), CODINGS, strict=False)
    )


LARGE = {
    "many rows": QuantizedCase(
        rows=1101,
        hidden=96,
        inputs=1,
        tokens=130,
        experts=(
            QuantizedExpert(copies=130),
            QuantizedExpert(Coding(2), center=1, copies=17, repeated=True),
            QuantizedExpert(Coding(4, "scalar"), center=None, copies=12),
            QuantizedExpert(Coding(1, "scalar"), copies=5),
            QuantizedExpert(Coding(3, "scalar"), center=1, copies=70, repeated=True),
        ),
    ),
    "long rows": QuantizedCase(
        rows=45,
        hidden=2560,
        tokens=40,
        experts=(*group(8, 3), QuantizedExpert(copies=40), QuantizedExpert(center=None, copies=33)),
        center_coding=Coding(2, "trellis", 128),
    ),
}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", LARGE)
@shared_or_not
@every_dtype
def test_large_problems_are_exact_on_any_number_of_threads(
    instruction_set, dtype, share_center, name, count, threads
):
    problem, expected = solved(LARGE[name], dtype)
    threads(count)

    found = mlp(problem, share_center=share_center)

    assert_close(found, expected, MANY[dtype])
    assert torch.equal(mlp(problem, share_center=share_center), found)


@shared_or_not
@every_dtype
@given(case=quantized_cases(st.integers(0, 9)), row_bias=st.booleans())
@settings(deadline=None, max_examples=30)
def test_mlps_by_two_products_are_right(kernels, dtype, share_center, case, row_bias):
    problem = replace(case, row_bias=row_bias).build(dtype, fused=False)
    backend = QuantizedCpuBackend(problem.layer, product_bytes=1)

    found = backend.mlp(problem.routed, share_center=share_center)

    assert_close(found, quantized_outputs(problem), 2 * MANY[dtype])


@every_dtype
@given(case=quantized_cases(st.just(0)), row_bias=st.booleans(), data=st.data())
@settings(deadline=None)
def test_any_rows_and_columns_are_restored(instruction_set, dtype, case, row_bias, data):
    problem = replace(case, row_bias=row_bias).build(dtype)
    layer = problem.layer
    first_row = data.draw(st.integers(0, layer.rows - 1), "first row")
    first = data.draw(st.integers(0, layer.shape.columns - 1), "first column")
    rows = data.draw(st.integers(1, layer.rows - first_row), "rows")
    columns = data.draw(st.integers(1, layer.shape.columns - first), "columns")
    for expert in range(layer.num_experts):
        exact_SD = decoded(layer.residuals[expert])
        if layer.center_of[expert] >= 0:
            exact_SD = exact_SD + decoded(layer.centers[layer.center_of[expert]])
        exact_RC = exact_SD[first_row : first_row + rows, first : first + columns]
        out = torch.full((rows, columns + 3), 99.0, dtype=dtype)

        QuantizedCpuBackend(layer).restore(expert, out[:, :columns], first_row, first)

        # Errors of float32 sums are relative to the whole row.
        size = 1e-6 * abs(exact_SD).max() + torch.finfo(dtype).eps / 2 * abs(exact_RC)
        assert (abs(out[:, :columns].double().numpy() - exact_RC) <= 1.01 * size).all()
        assert bool((out[:, columns:] == 99).all())


@cache
def large_output(dtype: torch.dtype) -> tuple[Problem, np.ndarray]:
    """A layer, and its only expert [I, D] restored in float64."""
    rows = (17 << 20) // (dtype.itemsize * 3 * 512) + 1
    problem = QuantizedCase(rows=rows, hidden=512).build(dtype)
    layer = problem.layer
    return problem, sum(decoded(matrix) for matrix in (*layer.residuals, *layer.centers))


@every_dtype
def test_large_outputs_are_restored_on_any_number_of_threads(instruction_set, dtype, threads):
    problem, expected = large_output(dtype)
    out = torch.empty(expected.shape, dtype=dtype)
    for count in (1, 3):
        threads(count)
        out.fill_(99)

        QuantizedCpuBackend(problem.layer).restore(0, out)

        error = abs(out.double().numpy() - expected)
        assert (error <= 1e-6 * abs(expected).max() + torch.finfo(dtype).eps * abs(expected)).all()


@every_dtype
def test_agrees_with_the_reference_backend(kernels, dtype):
    experts = (*group(9, 2), QuantizedExpert(center=None))
    problem = QuantizedCase(rows=30, hidden=192, tokens=8, experts=experts).build(dtype)
    expected = ReferenceBackend(problem.layer).mlp(problem.routed, share_center=False)

    assert backend_for(problem.layer).name == "quantized"
    found = mlp(problem, share_center=False)

    assert (found - expected).norm() <= 2 * MANY[dtype] * expected.norm()


@shared_or_not
@every_dtype
@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_few_rows_and_many_threads_work(instruction_set, dtype, share_center, rows, threads):
    experts = (QuantizedExpert(copies=20), QuantizedExpert(Coding(2, "scalar"), copies=4))
    problem = QuantizedCase(rows=rows, hidden=64, tokens=20, experts=experts).build(dtype)
    threads(4)

    found = mlp(problem, share_center=share_center)

    assert_close(found, quantized_outputs(problem), MANY[dtype])


@shared_or_not
@every_dtype
def test_no_copies_give_zeros(instruction_set, dtype, share_center):
    experts = (QuantizedExpert(copies=0), QuantizedExpert(center=None, copies=0))
    problem = QuantizedCase(rows=4, hidden=20, tokens=3, experts=experts).build(dtype)

    assert torch.equal(mlp(problem, share_center=share_center), torch.zeros(3, 20))


@shared_or_not
@every_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_in_one_token_reaches_only_its_own_result(instruction_set, dtype, bad, share_center):
    experts = (
        QuantizedExpert(copies=20),
        QuantizedExpert(Coding(2, "scalar"), copies=9),
        *group(2, 7),
    )
    problem = QuantizedCase(rows=41, hidden=96, tokens=20, experts=experts).build(dtype)
    before = mlp(problem, share_center=share_center)
    problem.routed.x_RH[4, 44] = bad

    after = mlp(problem, share_center=share_center)

    others_T = torch.arange(20) != 4
    assert torch.equal(after[others_T], before[others_T])
    assert not after[4].isfinite().any()


@every_dtype
@pytest.mark.parametrize("size", [1e-25, 1e-6, 1e20])
def test_tokens_of_any_magnitude_are_multiplied_as_exactly(instruction_set, dtype, size):
    problem = QuantizedCase(rows=33, hidden=96, tokens=4, inputs=1).build(dtype, "relu")
    expected = mlp(problem, share_center=True)
    routed = replace(problem.routed, x_RH=problem.routed.x_RH * size)

    found = QuantizedCpuBackend(problem.layer).mlp(routed, share_center=True)

    assert (found / size - expected).norm() <= 4 * FEW[dtype] * expected.norm()


def test_a_group_of_scale_zero_is_zero(instruction_set):
    problem = QuantizedCase(
        rows=2, hidden=64, rotated=False, inputs=1, experts=(QuantizedExpert(center=None),)
    ).build(torch.float32, "relu")
    problem.layer.residuals[0].scales[:, 1] = 0

    assert not mlp(problem, share_center=False).any()


def test_tensor_parallel_ranks_add_up_to_the_whole(kernels):
    experts = (QuantizedExpert(copies=4), QuantizedExpert(Coding(3, "scalar"), copies=2))
    problem = QuantizedCase(rows=43, hidden=80, tokens=4, experts=experts).build(torch.float32)
    whole = mlp(problem, share_center=True)
    parts = torch.zeros_like(whole)
    for rows in (slice(0, 14), slice(14, 28), slice(28, 43)):
        layer = replace(
            problem.layer,
            residuals=tuple(m.slice_rows(rows.start, rows.stop) for m in problem.layer.residuals),
            centers=tuple(m.slice_rows(rows.start, rows.stop) for m in problem.layer.centers),
        )
        parts += QuantizedCpuBackend(layer).mlp(problem.routed, share_center=True)

    assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("group_size", [16, 48])
def test_groups_that_are_no_whole_steps_are_left_to_the_reference(kernels, group_size):
    experts = (QuantizedExpert(Coding(group=group_size)),)
    problem = QuantizedCase(rows=4, hidden=96, experts=experts).build(torch.float32)

    assert not QuantizedCpuBackend.supports(problem.layer)
    assert backend_for(problem.layer).name == "reference"


@every_dtype
def test_arguments_are_not_changed(instruction_set, dtype):
    case = QuantizedCase(rows=9, hidden=64, tokens=20, experts=(QuantizedExpert(copies=20),))
    problem, same = case.build(dtype), case.build(dtype)

    mlp(problem, share_center=True)
    mlp(problem, share_center=False)

    for name, tensor in vars(same.routed).items():
        assert torch.equal(getattr(problem.routed, name), tensor)
    for name, tensor in same.layer.residuals[0].tensors().items():
        assert torch.equal(problem.layer.residuals[0].tensors()[name], tensor)


def test_an_activation_without_a_kernel_still_runs(kernels):
    problem = QuantizedCase(rows=5, hidden=32, tokens=2).build(torch.float32)
    layer = replace(problem.layer, activation=PlainActivation("silu", fused=False))
    found = QuantizedCpuBackend(layer).mlp(problem.routed, share_center=True)

    assert_close(found, quantized_outputs(problem), 1e-5)


def test_dropped_copies_add_nothing(instruction_set):
    problem = QuantizedCase(
        rows=9, hidden=64, tokens=8, experts=(QuantizedExpert(copies=8),)
    ).build(torch.float32)
    expected = mlp(problem, share_center=True)
    routed = problem.routed
    dropped = RoutedTokens(
        routed.x_RH,
        torch.cat([routed.token_N, torch.tensor([0, 7])]),
        torch.cat([routed.weight_N, torch.zeros(2)]),
        routed.offsets_L,
    )

    found = QuantizedCpuBackend(problem.layer).mlp(dropped, share_center=True)

    assert torch.equal(found, expected)
    assert np.isfinite(found.numpy()).all()
