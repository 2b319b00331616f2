"""Whole MLPs of the C++ kernels on every instruction set of this machine, against float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from resmoe_dist.codecs import DenseMatrix
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.kernels import LayerWeights
from resmoe_dist.kernels.cpu.backend import DTYPES, CpuBackend
from resmoe_dist.routing import RoutedTokens
from tests.kernels.mlp_problems import (
    H_ROUNDING,
    MLP_CASES,
    MlpCase,
    Outputs,
    activate,
    assert_outputs,
    outputs,
)
from tests.kernels.problems import Case, Expert, PlainActivation, Problem, pruned

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_activation = pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])
shared_or_not = pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])


def mlp(problem: Problem, *, share_center: bool) -> Tensor:
    return CpuBackend(problem.layer).mlp(problem.routed, share_center=share_center)


@shared_or_not
@every_dtype
@given(case=MLP_CASES)
@settings(deadline=None)
def test_mlps_are_exact(instruction_set, dtype, share_center, case):
    problem = case.build(dtype)

    found = mlp(problem, share_center=share_center)

    assert_outputs(found, outputs(problem, share_center=share_center))


@shared_or_not
@every_dtype
@given(case=MLP_CASES)
@settings(deadline=None, max_examples=30)
def test_mlps_by_two_products_are_exact(kernels, dtype, share_center, case):
    problem, fused = case.build(dtype, fused=False), case.build(dtype)

    found = CpuBackend(problem.layer, product_bytes=1).mlp(
        problem.routed, share_center=share_center
    )

    assert_outputs(found, outputs(fused, share_center=share_center))


def group(size: int, copies: int) -> tuple[Expert, ...]:
    return tuple(Expert(copies=copies, repeated=True, center=k % 2) for k in range(size))


LARGE = {
    "a layer": MlpCase(
        Case(
            rows=300,
            hidden=512,
            tokens=40,
            experts=(
                *group(8, 10),
                Expert(center=2, copies=40),
                Expert(center=None, copies=33),
            ),
        )
    ),
    # More rows than a block of four threads, several chunks, and jobs with few and many copies.
    "many rows": MlpCase(
        Case(
            rows=1101,
            hidden=65,
            inputs=1,
            tokens=130,
            experts=(
                Expert(copies=130),
                Expert(center=1, copies=17, repeated=True),
                Expert(center=None, share=0.6, copies=12),
                Expert(copies=5),
                Expert(share=0.0, copies=1),
                Expert(center=1, copies=70, repeated=True),
            ),
        ),
        activation="gelu_tanh",
    ),
    "many rows of one centre": MlpCase(
        Case(
            rows=389,
            hidden=90,
            tokens=40,
            experts=(Expert(copies=40), Expert(copies=15), Expert(copies=20), Expert(copies=2)),
        ),
        activation="relu",
    ),
    "long rows": MlpCase(
        Case(
            rows=37,
            hidden=2100,
            extra=2,
            tokens=40,
            experts=(
                Expert(copies=40),
                Expert(copies=3),
                *group(3, 7),
                Expert(center=None, copies=33),
            ),
        )
    ),
}


@cache
def large_problem(name: str, dtype: torch.dtype, share_center: bool) -> tuple[Problem, Outputs]:
    """A problem and what `mlp` should give. NumPy is slow, and all instruction sets share it."""
    problem = LARGE[name].build(dtype)
    return problem, outputs(problem, share_center=share_center)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", LARGE)
@shared_or_not
@every_dtype
def test_large_problems_are_exact_on_any_number_of_threads(
    instruction_set, dtype, share_center, name, count, threads
):
    problem, expected = large_problem(name, dtype, share_center)
    threads(count)

    found = mlp(problem, share_center=share_center)

    assert_outputs(found, expected)
    assert torch.equal(mlp(problem, share_center=share_center), found)


# 1030 tokens of 4096 columns: the sums of four threads are 67 MB.
VAST = MlpCase(
    Case(
        rows=5,
        hidden=4096,
        inputs=1,
        tokens=1030,
        experts=(
            Expert(center=1, copies=30),
            Expert(copies=3),
            Expert(center=1, copies=13, share=0.0),
            Expert(center=2, copies=20),
            Expert(center=None, copies=1),
        ),
        gap=1,
    )
)


@every_dtype
def test_many_tokens_add_shared_centres_to_the_residuals(instruction_set, dtype, threads):
    problem = VAST.build(dtype)
    threads(4)

    found = mlp(problem, share_center=True)

    assert_outputs(found, outputs(problem, share_center=False))
    assert torch.equal(mlp(problem, share_center=True), found)


@pytest.mark.parametrize(("count", "rounded"), [(1, False), (4, True)])
def test_a_centre_added_to_the_residual_is_rounded_with_it(
    instruction_set, threads, count, rounded
):
    # relu(1) · (1 + 2⁻⁹), of which bfloat16 keeps 1.
    tokens, hidden = VAST.case.tokens, VAST.case.hidden
    center, mask = torch.zeros(1, 2 * hidden).bfloat16(), np.zeros((1, 2 * hidden), bool)
    center[0, 0] = center[0, hidden] = 1
    mask[0, hidden] = True
    layer = LayerWeights(
        ExpertShape(1, hidden, gated=False),
        (pruned(mask, torch.tensor([2.0**-9]).bfloat16()),),
        (DenseMatrix.of(center),),
        (0,),
        PlainActivation("relu"),
    )
    x_RH = torch.zeros(tokens, hidden).bfloat16()
    x_RH[7, 0] = 1
    routed = RoutedTokens(x_RH, torch.tensor([7]), torch.ones(1), torch.tensor([0, 1]))
    threads(count)

    found = CpuBackend(layer).mlp(routed, share_center=True)

    expected = torch.zeros(tokens, hidden)
    expected[7, 0] = 1 if rounded else 1 + 2.0**-9
    assert torch.equal(found, expected)


@every_dtype
def test_more_copies_than_fit_are_packed_in_several_passes(instruction_set, dtype):
    # With 4096 columns, 1024 copies fit.
    experts = (
        Expert(copies=700, repeated=True),
        Expert(center=1, copies=1101, repeated=True),
        Expert(center=None, copies=330, repeated=True),
        Expert(center=2, copies=2100, repeated=True),
    )
    problem = MlpCase(Case(rows=3, hidden=4096, tokens=9, experts=experts)).build(dtype)

    assert_outputs(mlp(problem, share_center=False), outputs(problem, share_center=False))


@shared_or_not
@every_dtype
def test_more_threads_than_rows_work(instruction_set, dtype, share_center, threads):
    experts = (Expert(copies=20), Expert(copies=4), Expert(center=1, copies=3))
    problem = MlpCase(Case(rows=3, hidden=50, tokens=20, experts=experts)).build(dtype)
    threads(4)

    found = mlp(problem, share_center=share_center)

    assert_outputs(found, outputs(problem, share_center=share_center))


@shared_or_not
@every_dtype
def test_zero_rows_give_zeros(instruction_set, dtype, share_center):
    experts = (Expert(copies=20), Expert(copies=4))
    problem = MlpCase(Case(rows=0, hidden=45, tokens=20, experts=experts)).build(dtype)

    assert torch.equal(mlp(problem, share_center=share_center), torch.zeros(20, 45))


@shared_or_not
@every_dtype
def test_no_copies_give_zeros(instruction_set, dtype, share_center):
    experts = (Expert(copies=0), Expert(center=None, copies=0))
    problem = MlpCase(Case(rows=4, hidden=20, tokens=3, experts=experts)).build(dtype)

    assert torch.equal(mlp(problem, share_center=share_center), torch.zeros(3, 20))


# Shared centres use the kernel for few copies. Otherwise this many copies are packed.
@shared_or_not
@every_activation
@every_dtype
def test_activations_are_exact_over_their_whole_range(
    instruction_set, dtype, activation, share_center
):
    x = np.concatenate([np.linspace(-100, 100, 3001), np.geomspace(1e-30, 1e30, 200)])
    x_T1 = torch.from_numpy(np.concatenate([x, -x, [0]])).to(dtype).unsqueeze(1)
    tokens, ones = len(x_T1), torch.ones(1, 2, dtype=dtype)
    layer = LayerWeights(
        ExpertShape(1, 1, gated=False),
        (pruned(np.zeros((1, 2), bool), ones[0, :0]),),
        (DenseMatrix.of(ones),),
        (0,),
        PlainActivation(activation),
    )
    routed = RoutedTokens(x_T1, torch.arange(tokens), torch.ones(tokens), torch.tensor([0, tokens]))

    found = CpuBackend(layer).mlp(routed, share_center=share_center)

    x_T1 = x_T1.double().numpy()
    expected = activate(activation, x_T1)
    # The first term as in `outputs`.
    bound = 8 * 2.0**-24 * abs(x_T1) + H_ROUNDING[dtype] * abs(expected)
    assert (abs(found.double().numpy() - expected) <= bound).all()


@shared_or_not
@every_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_in_one_token_reaches_only_its_own_result(instruction_set, dtype, bad, share_center):
    experts = (
        Expert(copies=20),
        Expert(copies=9),
        *group(2, 7),
        Expert(center=None, copies=13),
    )
    problem = MlpCase(Case(rows=21, hidden=45, tokens=20, experts=experts)).build(dtype)
    before = mlp(problem, share_center=share_center)
    problem.routed.x_RH[4, 44] = bad

    after = mlp(problem, share_center=share_center)

    others_T = torch.arange(20) != 4
    assert torch.equal(after[others_T], before[others_T])
    assert not after[4].isfinite().any()


@shared_or_not
@every_dtype
def test_buffers_hold_nothing_of_earlier_calls(instruction_set, dtype, share_center):
    experts = (Expert(share=0.0, copies=90), Expert(copies=9), Expert(center=1, copies=9))
    spoilt = MlpCase(Case(rows=80, hidden=700, tokens=90, experts=experts)).build(dtype)
    spoilt.routed.x_RH.fill_(torch.nan)
    for rows in (1, 2, 3, 5, 17):
        experts = (*(Expert(copies=n) for n in (13, 9, 1)), Expert(center=1, copies=2))
        problem = MlpCase(Case(rows=rows, hidden=45, tokens=13, experts=experts)).build(dtype)
        assert mlp(spoilt, share_center=share_center).isnan().all()

        found = mlp(problem, share_center=share_center)

        assert_outputs(found, outputs(problem, share_center=share_center))


@shared_or_not
@every_dtype
def test_arguments_are_not_changed(instruction_set, dtype, share_center):
    experts = (Expert(copies=20), Expert(copies=4), Expert(center=1, copies=3))
    case = MlpCase(Case(rows=9, hidden=50, tokens=20, experts=experts))
    problem, same = case.build(dtype), case.build(dtype)

    mlp(problem, share_center=share_center)

    for name, tensor in vars(same.routed).items():
        assert torch.equal(getattr(problem.routed, name), tensor)
    for changed, matrix in zip(
        (*problem.layer.centers, *problem.layer.residuals),
        (*same.layer.centers, *same.layer.residuals),
        strict=True,
    ):
        for name, tensor in matrix.tensors().items():
            assert torch.equal(changed.tensors()[name], tensor)


@shared_or_not
def test_dropped_copies_add_nothing(instruction_set, share_center):
    experts = (Expert(copies=20), Expert(center=None, copies=4))
    problem = MlpCase(Case(rows=9, hidden=50, tokens=20, experts=experts)).build(torch.float32)
    expected = mlp(problem, share_center=share_center)
    routed = problem.routed
    dropped = problem._replace(
        routed=replace(
            routed,
            token_N=torch.cat([routed.token_N, torch.tensor([0, 19])]),
            weight_N=torch.cat([routed.weight_N, torch.zeros(2)]),
        )
    )

    assert torch.equal(mlp(dropped, share_center=share_center), expected)
