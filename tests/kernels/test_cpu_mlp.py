"""Whole MLPs of the C++ kernels on every instruction set of this machine, against float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from resmoe_dist.kernels.cpu import operations as cpu_kernels
from resmoe_dist.kernels.rows import CompressedRows
from tests.kernels.mlp_problems import (
    H_ROUNDING,
    MLP_CASES,
    MlpCase,
    MlpProblem,
    SharingPart,
    activate,
    assert_outputs,
    outputs,
)
from tests.kernels.problems import Case, Part, packed

every_dtype = pytest.mark.parametrize("dtype", cpu_kernels.DTYPES, ids=str)
every_activation = pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])


@every_dtype
@given(case=MLP_CASES)
@settings(deadline=None)
def test_mlps_give_the_exact_sums(instruction_set, dtype, case):
    problem = case.build(dtype)

    assert_outputs(cpu_kernels.mlp(*problem), outputs(case, problem))


def pairs(size: int, copies: int) -> tuple[Part, ...]:
    return tuple(SharingPart(copies=copies, repeated=True, shared=k % 2) for k in range(size))


LARGE = {
    "a layer": MlpCase(
        Case(
            rows=300,
            hidden=512,
            tokens=40,
            parts=(*pairs(8, 10), Part(copies=40), Part(center=False, copies=33)),
        )
    ),
    # More than a block's rows of four threads, several chunks, and passes over few copies.
    "many rows": MlpCase(
        Case(
            rows=1101,
            hidden=65,
            inputs=1,
            tokens=130,
            parts=(
                Part(copies=130),
                Part(copies=17, repeated=True),
                Part(center=False, share=0.6, copies=12),
                Part(copies=5),
                Part(share=None, copies=1),
                SharingPart(copies=70, repeated=True),
            ),
        ),
        activation="gelu_tanh",
    ),
    "many rows of one centre": MlpCase(
        Case(
            rows=389,
            hidden=90,
            tokens=40,
            parts=(Part(copies=40), Part(copies=15), Part(copies=20), Part(copies=2)),
            one_center=True,
        ),
        activation="relu",
    ),
    "long rows": MlpCase(
        Case(
            rows=37,
            hidden=2100,
            extra=2,
            tokens=40,
            parts=(Part(copies=40), Part(copies=3), *pairs(3, 7), Part(center=False, copies=33)),
        )
    ),
}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", LARGE)
@every_dtype
def test_large_problems_give_the_exact_sums_on_any_number_of_threads(
    instruction_set, dtype, name, count, threads
):
    problem = LARGE[name].build(dtype)
    threads(count)

    found = cpu_kernels.mlp(*problem)

    assert_outputs(found, outputs(LARGE[name], problem))
    assert torch.equal(cpu_kernels.mlp(*problem), found)


# Of 1030 tokens with 4096 columns four threads' sums are 67 MB.
VAST = MlpCase(
    Case(
        rows=5,
        hidden=4096,
        inputs=1,
        tokens=1030,
        parts=(
            SharingPart(copies=30, shared=1),
            SharingPart(copies=3, before=2),
            SharingPart(copies=13, shared=1, share=0.0),
            Part(copies=20),
            Part(center=False, copies=1),
        ),
    ),
    gap=1,
)


@every_dtype
def test_with_many_tokens_shared_centres_are_taken_along(instruction_set, dtype, threads):
    problem = VAST.build(dtype)
    threads(4)

    found = cpu_kernels.mlp(*problem)

    assert_outputs(found, outputs(VAST, problem.taking_centers_along()))
    assert torch.equal(cpu_kernels.mlp(*problem), found)


@pytest.mark.parametrize(("count", "rounded"), [(1, False), (4, True)])
def test_a_centre_that_is_taken_along_is_rounded_with_the_residual(
    instruction_set, threads, count, rounded
):
    # relu(1) · (1 + 2⁻⁹), of which bfloat16 keeps 1.
    tokens, hidden = VAST.case.tokens, VAST.case.hidden
    center, mask = torch.zeros(1, 2 * hidden).bfloat16(), np.zeros((1, 2 * hidden), bool)
    center[0, 0] = center[0, hidden] = 1
    mask[0, hidden] = True
    values, offsets = torch.tensor([2.0**-9]).bfloat16(), torch.tensor([0, 1])
    x_TH = torch.zeros(tokens, hidden).bfloat16()
    x_TH[7, 0] = 1
    rows = CompressedRows(bitmap=packed(mask), values=values, row_offsets=offsets)
    threads(count)

    found = cpu_kernels.mlp(
        x_TH, torch.tensor([7]), torch.ones(1), [1], [rows], [center], [0], 1, "relu"
    )

    expected = torch.zeros(tokens, hidden)
    expected[7, 0] = 1 if rounded else 1 + 2.0**-9
    assert torch.equal(found, expected)


@every_dtype
def test_more_copies_than_are_packed_at_a_time_are_run_in_turn(instruction_set, dtype):
    # With 4096 columns that is 1024 copies.
    parts = (
        Part(copies=700, repeated=True),
        Part(copies=1101, repeated=True),
        Part(center=False, copies=330, repeated=True),
        Part(copies=2100, repeated=True),
    )
    case = MlpCase(Case(rows=3, hidden=4096, inputs=2, tokens=9, parts=parts))
    problem = case.build(dtype)

    assert_outputs(cpu_kernels.mlp(*problem), outputs(case, problem))


@every_dtype
def test_more_threads_than_rows_are_no_obstacle(instruction_set, dtype, threads):
    parts = (Part(copies=20), Part(copies=4), SharingPart(copies=3))
    case = MlpCase(Case(rows=3, hidden=50, tokens=20, parts=parts))
    problem = case.build(dtype)
    threads(4)

    assert_outputs(cpu_kernels.mlp(*problem), outputs(case, problem))


@every_dtype
def test_without_rows_there_is_nothing_to_add_up(instruction_set, dtype):
    parts = tuple(replace(part, after=2) for part in (Part(copies=20), SharingPart(copies=4)))
    problem = MlpCase(Case(rows=0, hidden=45, tokens=20, parts=parts)).build(dtype)

    assert torch.equal(cpu_kernels.mlp(*problem), torch.zeros(20, 45))


# A centre that is shared is never run with packed copies, one's own with so many always.
@pytest.mark.parametrize("shared", [True, False])
@every_activation
@every_dtype
def test_activations_are_right_wherever_they_are_taken(instruction_set, dtype, activation, shared):
    x = np.concatenate([np.linspace(-100, 100, 3001), np.geomspace(1e-30, 1e30, 200)])
    x_T1 = torch.from_numpy(np.concatenate([x, -x, [0]])).to(dtype).unsqueeze(1)
    tokens, ones = len(x_T1), torch.ones(1, 2, dtype=dtype)
    rows = CompressedRows(ones)
    if shared:
        nothing = np.zeros((1, 2), bool)
        rows = CompressedRows(None, packed(nothing), ones[0, :0], torch.zeros(2, dtype=torch.int32))

    found = cpu_kernels.mlp(
        x_T1,
        torch.arange(tokens),
        torch.ones(tokens),
        [tokens],
        [rows],
        [ones] if shared else [],
        [0 if shared else -1],
        1,
        activation,
    )

    x_T1 = x_T1.double().numpy()
    expected = activate(activation, x_T1)
    # The first as `outputs` says.
    bound = 8 * 2.0**-24 * abs(x_T1) + H_ROUNDING[dtype] * abs(expected)
    assert (abs(found.double().numpy() - expected) <= bound).all()


@every_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_token_that_is_no_number_spoils_its_own_result_alone(instruction_set, dtype, bad):
    parts = (Part(copies=20), Part(copies=9), *pairs(2, 7), Part(center=False, copies=13))
    problem = MlpCase(Case(rows=21, hidden=45, tokens=20, parts=parts)).build(dtype)
    before = cpu_kernels.mlp(*problem)
    problem.x_TH[4, 44] = bad

    after = cpu_kernels.mlp(*problem)

    others_T = torch.arange(20) != 4
    assert torch.equal(after[others_T], before[others_T])
    assert not after[4].isfinite().any()


@every_dtype
def test_nothing_of_earlier_problems_is_left_in_later_ones(instruction_set, dtype):
    parts = (Part(share=None, copies=90), Part(share=None, copies=9), SharingPart(copies=9))
    spoilt = MlpCase(Case(rows=80, hidden=700, tokens=90, parts=parts)).build(dtype)
    spoilt.x_TH.fill_(torch.nan)
    for rows in (1, 2, 3, 5, 17):
        parts = (Part(copies=13), Part(copies=9), Part(copies=1), SharingPart(copies=2))
        case = MlpCase(Case(rows=rows, hidden=45, tokens=13, parts=parts))
        problem = case.build(dtype)
        assert cpu_kernels.mlp(*spoilt).isnan().all()

        assert_outputs(cpu_kernels.mlp(*problem), outputs(case, problem))


@every_dtype
def test_what_is_given_stays_as_it_was(instruction_set, dtype):
    parts = (Part(copies=20), Part(copies=4), SharingPart(copies=3))
    case = MlpCase(Case(rows=9, hidden=50, tokens=20, parts=parts))
    problem, same = case.build(dtype), case.build(dtype)

    cpu_kernels.mlp(*problem)

    assert torch.equal(problem.x_TH, same.x_TH)
    assert torch.equal(problem.weight_N, same.weight_N)
    assert torch.equal(problem.centers[0], same.centers[0])
    assert outputs(case, problem).exact.tolist() == outputs(case, same).exact.tolist()


# What a caller got wrong. Rows [4, 60] of 20 hidden, 3 tokens: one with its own centre, one shared.


def _right() -> MlpProblem:
    parts = (Part(copies=3), SharingPart(copies=2))
    return MlpCase(Case(rows=4, hidden=20, tokens=3, parts=parts)).build(torch.float32)


def _with_job(**tensors: Tensor | None) -> list[CompressedRows]:
    own, sharing = _right().jobs
    return [own, replace(sharing, **tensors)]


CENTER = torch.ones(4, 60)
MISTAKES = {
    "weights of another dtype": ({"weight_N": torch.ones(5).double()}, "weights must be float32"),
    "weights of half the size": ({"weight_N": torch.ones(5).bfloat16()}, "weights must be float32"),
    "a weight less": ({"weight_N": torch.ones(4)}, "one for each copy"),
    "a weight more": ({"weight_N": torch.ones(6)}, "one for each copy"),
    "weights of two dimensions": ({"weight_N": torch.ones(5, 1)}, "one for each copy"),
    "weights with gaps": ({"weight_N": torch.ones(10)[::2]}, "in one piece"),
    "an unknown activation": ({"activation": "gelu"}, "no activation gelu"),
    "a centre past the last": ({"center_J": [-1, 1]}, "no centre 1"),
    "a centre before the first": ({"center_J": [-2, 0]}, "no centre -2"),
    "a centre fewer than jobs": ({"center_J": [-1]}, "shared centres and jobs disagree"),
    "a centre more than jobs": ({"center_J": [-1, 0, 0]}, "shared centres and jobs disagree"),
    "a centre besides its own": ({"center_J": [0, 0]}, "a job with two centres"),
    "centre of another dtype": ({"centers": [CENTER.double()]}, "centre of another"),
    "centre of fewer columns": ({"centers": [CENTER[:, :59]]}, "centre of another"),
    "centre of other rows": ({"centers": [CENTER[:3]]}, "centre of another"),
    "centre by columns": ({"centers": [torch.ones(60, 4).T]}, "centre of another"),
    "an unused centre of other rows": ({"centers": [CENTER, CENTER[:3]]}, "centre of another"),
    "tokens of another dtype": ({"x_TH": torch.ones(3, 20).bfloat16()}, "another .*dtype"),
    "tokens in double precision": ({"x_TH": torch.ones(3, 20).double()}, "dtype"),
    "tokens of more columns": ({"x_TH": torch.ones(3, 40)}, "another shape"),
    "tokens of one dimension": ({"x_TH": torch.ones(20)}, "rows of a matrix"),
    "fewer tokens than their numbers": ({"x_TH": torch.ones(2, 20)}, "no token 2"),
    "a token before the first": ({"token_N": torch.tensor([0, 1, 2, -1, 1])}, "no token -1"),
    "token numbers of 32 bits": ({"token_N": torch.arange(5).int()}, "int64"),
    "more copies than token numbers": ({"counts_J": [3, 3]}, "counts and token numbers disagree"),
    "fewer copies than token numbers": ({"counts_J": [3, 1]}, "counts and token numbers disagree"),
    "a negative number of copies": ({"counts_J": [6, -1]}, "counts and token numbers disagree"),
    "fewer counts than jobs": ({"counts_J": [5]}, "counts and jobs disagree"),
    "no inputs": ({"inputs": 0}, "1 or 2 inputs"),
    "three inputs": ({"inputs": 3}, "1 or 2 inputs"),
    "a bitmap of fewer columns": (
        {"jobs": _with_job(bitmap=torch.zeros(4, 7, dtype=torch.uint8))},
        "bitmap of another",
    ),
    "offsets past the values": (
        {"jobs": _with_job(row_offsets=torch.arange(5) * 60 + 2**40)},
        "past the values",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_error_not_a_crash(kernels, mistake):
    changed, message = MISTAKES[mistake]

    with pytest.raises(RuntimeError, match=message):
        cpu_kernels.mlp(*_right()._replace(**changed))


def test_what_the_mistakes_are_made_of_is_right(kernels):
    cpu_kernels.mlp(*_right())
    cpu_kernels.mlp(*_right()._replace(centers=[CENTER], jobs=_with_job()))


@every_dtype
def test_centers_that_no_job_takes_add_nothing(instruction_set, dtype):
    center = torch.ones(4, 60, dtype=dtype)
    none = torch.empty(0, dtype=torch.int64)
    x_TH = torch.ones(3, 20, dtype=dtype)

    found = cpu_kernels.mlp(x_TH, none, torch.empty(0), [], [], [center], [], 2, "silu")

    assert torch.equal(found, torch.zeros(3, 20))
