"""The C++ kernels on every instruction set of this machine, against the reference.

Restoring is compared exactly: as numbers, so that a zero of either sign is zero and a NaN is a NaN.
Products are sums in float32 of terms that are exact there (of bfloat16) or rounded once: see
`assert_sums`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.kernels import reference
from resmoe_dist.kernels.cpu import operations as cpu_kernels
from resmoe_dist.kernels.rows import CompressedRows
from tests.kernels.problems import (
    CASES,
    INSTRUCTION_SETS,
    Case,
    Part,
    Sums,
    assert_equal_numbers,
    assert_sums,
    columns_of,
    packed,
    restored,
    sums_in,
    sums_out,
)

every_dtype = pytest.mark.parametrize("dtype", cpu_kernels.DTYPES, ids=str)


def test_the_best_instruction_set_comes_first_and_all_are_tested_here(kernels):
    found = cpu_kernels.instruction_sets()

    assert found == [name for name in INSTRUCTION_SETS if name in found]
    assert found[-1] == "portable"


def test_an_instruction_set_that_is_none_is_refused(kernels):
    with pytest.raises(RuntimeError, match="no instruction set mmx"):
        cpu_kernels.use_instruction_set("mmx")


@every_dtype
@given(case=CASES, data=st.data())
@settings(deadline=None)
def test_restoring_gives_the_numbers_of_the_reference(instruction_set, dtype, case, data):
    first, columns = columns_of(case, data)
    for rows in case.build(dtype).jobs:
        expected = restored(reference, rows, columns, first)

        assert_equal_numbers(restored(cpu_kernels, rows, columns, first), expected)


@every_dtype
@given(case=CASES)
@settings(deadline=None)
def test_products_on_the_way_in_are_those_of_the_reference(instruction_set, dtype, case):
    problem = case.build(dtype)

    found = problem.project_in(cpu_kernels)

    magnitude = sums_in(case, problem).magnitude
    assert_sums(found, Sums(problem.project_in(reference).double().numpy(), magnitude))


@every_dtype
@given(case=CASES)
@settings(deadline=None)
def test_products_on_the_way_out_are_those_of_the_reference(instruction_set, dtype, case):
    problem = case.build(dtype)

    found = problem.project_out(cpu_kernels)

    magnitude = sums_out(case, problem).magnitude
    assert_sums(found, Sums(problem.project_out(reference).double().numpy(), magnitude))


# A layer's centre, with each token once, and eight experts with 40 tokens, two experts each.
LAYER = Case(
    rows=300,
    hidden=512,
    tokens=40,
    parts=(
        Part(share=None, copies=40),
        *(Part(center=False, copies=10, repeated=True) for _ in range(8)),
    ),
)
LARGE = {
    "a layer": LAYER,
    "long rows": Case(
        rows=37,
        hidden=2100,
        extra=2,
        tokens=40,
        parts=(Part(copies=40), Part(copies=3), Part(center=False, copies=33, repeated=True)),
    ),
    "many rows of one centre": Case(
        rows=389,
        hidden=90,
        inputs=1,
        tokens=40,
        parts=(Part(copies=40), Part(copies=5), Part(copies=20), Part(share=None, copies=1)),
        one_center=True,
    ),
    # More than 4 MB of sums.
    "many tokens": Case(
        rows=9, hidden=2050, tokens=530, parts=(Part(copies=530), Part(copies=40, repeated=True))
    ),
}


@pytest.mark.parametrize("name", LARGE)
@every_dtype
def test_large_problems_give_the_exact_sums(instruction_set, dtype, name):
    problem = LARGE[name].build(dtype)

    assert_sums(problem.project_in(cpu_kernels), sums_in(LARGE[name], problem))
    assert_sums(problem.project_out(cpu_kernels), sums_out(LARGE[name], problem))


@pytest.mark.parametrize("name", LARGE)
@every_dtype
def test_the_number_of_threads_changes_no_more_than_the_order_of_sums(
    instruction_set, dtype, threads, name
):
    problem = LARGE[name].build(dtype)
    sums = sums_out(LARGE[name], problem)
    alone = problem.project_in(cpu_kernels)
    for count in (2, 4):
        threads(count)
        again = problem.project_out(cpu_kernels)

        assert torch.equal(problem.project_in(cpu_kernels), alone)
        assert_sums(again, sums)
        assert torch.equal(problem.project_out(cpu_kernels), again)


@every_dtype
def test_more_threads_than_rows_are_no_obstacle(instruction_set, dtype, threads):
    case = Case(rows=3, hidden=50, tokens=9, parts=(Part(copies=9), Part(copies=4)))
    problem = case.build(dtype)
    threads(4)

    assert_sums(problem.project_in(cpu_kernels), sums_in(case, problem))
    assert_sums(problem.project_out(cpu_kernels), sums_out(case, problem))


@every_dtype
def test_without_rows_there_is_nothing_to_add_up(instruction_set, dtype):
    parts = (Part(copies=9, after=2), Part(copies=4, after=2))
    problem = Case(rows=0, hidden=45, tokens=9, parts=parts).build(dtype)

    assert problem.project_in(cpu_kernels).shape == (13, 0)
    assert torch.equal(problem.project_out(cpu_kernels), torch.zeros(9, 45))


# 17 MB and more is written past the caches, where the output is aligned.
@pytest.mark.parametrize("aligned", [True, False])
@every_dtype
def test_large_outputs_are_restored_on_any_number_of_threads(
    instruction_set, dtype, aligned, threads
):
    case = Case(rows=(17 << 20) // (dtype.itemsize * 3 * 2048) + 1, hidden=2048)
    (rows,) = case.build(dtype).jobs
    expected = restored(reference, rows, case.columns - 3)
    room = torch.empty(case.rows * case.columns + 64, dtype=dtype)
    first = -room.data_ptr() % 64 // dtype.itemsize + (0 if aligned else 5)
    out = room[first : first + case.rows * case.columns].view(case.rows, -1)[:, :-3]
    for count in (1, 3):
        threads(count)
        out.fill_(99)
        cpu_kernels.restore(rows, out)

        assert torch.equal(out, expected)


@every_dtype
def test_restoring_into_part_of_a_matrix_leaves_the_rest_alone(instruction_set, dtype):
    case = Case(rows=9, hidden=29, extra=1)
    (rows,) = case.build(dtype).jobs
    whole = torch.full((9, 60), 99, dtype=dtype)

    cpu_kernels.restore(rows, whole[:, 7:51], 11)

    assert torch.equal(whole[:, 7:51], restored(reference, rows, 44, 11))
    assert bool((whole[:, :7] == 99).all())
    assert bool((whole[:, 51:] == 99).all())


def extremes(dtype: torch.dtype) -> list[float]:
    """Zeros, denormal, smallest and largest numbers, what is none, and ordinary ones."""
    finfo = torch.finfo(dtype)
    smallest = finfo.tiny * finfo.eps
    positive = [0.0, smallest, 3 * smallest, finfo.tiny, 1.5 * finfo.tiny]
    positive += [1.0, 1 + finfo.eps, 3.0, finfo.max / 2, finfo.max, torch.inf]
    return [*positive, *(-value for value in positive), torch.nan]


def all_sums(dtype: torch.dtype) -> CompressedRows:
    """Every extreme number plus every other, in columns enough for whole registers and a rest."""
    values = torch.tensor(extremes(dtype), dtype=dtype)
    count = len(values)
    residual = values.repeat(count, 3)
    mask = np.ones(residual.shape, bool)
    return CompressedRows(
        values.unsqueeze(1).repeat(1, 3 * count),
        packed(mask),
        residual.flatten(),
        torch.arange(count + 1, dtype=torch.int32) * 3 * count,
    )


def without_denormals(numbers: Tensor) -> Tensor:
    """Zeros in their place."""
    return torch.where(numbers.abs() < torch.finfo(numbers.dtype).tiny, 0, numbers)


@every_dtype
def test_extreme_numbers_are_added_as_any_others(instruction_set, dtype):
    rows = all_sums(dtype)
    columns = rows.center.shape[1]
    if (instruction_set, dtype) == ("avx512_bf16", torch.bfloat16):
        # It adds with instructions that take denormal numbers for zeros, what they are given and
        # what they find.
        center, values = without_denormals(rows.center), without_denormals(rows.values)
        flushed = replace(rows, center=center, values=values)
        expected = without_denormals(restored(reference, flushed, columns))
    else:
        expected = restored(reference, rows, columns)

    assert_equal_numbers(restored(cpu_kernels, rows, columns), expected)


@every_dtype
def test_extreme_numbers_of_a_centre_stay_to_the_bit_where_nothing_was_kept(instruction_set, dtype):
    every = all_sums(dtype)
    mask = np.random.default_rng(0).random(every.center.shape) < 0.5
    kept = torch.from_numpy(mask)
    values = every.values.view(mask.shape)[kept]
    offsets = np.concatenate([[0], mask.sum(1).cumsum()])
    rows = CompressedRows(every.center, packed(mask), values, torch.from_numpy(offsets))
    together = restored(cpu_kernels, every, mask.shape[1])

    found = restored(cpu_kernels, rows, mask.shape[1])

    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(found[~kept].view(bits), every.center[~kept].view(bits))
    assert_equal_numbers(found[kept], together[kept])


@every_dtype
def test_extreme_numbers_of_one_part_stay_what_they_are(instruction_set, dtype):
    both = all_sums(dtype)
    mask = np.zeros((both.count, both.center.shape[1]), bool)
    nothing = (packed(mask), both.values[:0], torch.zeros_like(both.row_offsets))
    residual = CompressedRows(None, both.bitmap, both.values, both.row_offsets)

    for rows in (CompressedRows(both.center), CompressedRows(both.center, *nothing), residual):
        expected = restored(reference, rows, both.center.shape[1])
        assert_equal_numbers(restored(cpu_kernels, rows, both.center.shape[1]), expected)


@every_dtype
def test_denormal_numbers_are_multiplied_or_taken_for_zeros(instruction_set, dtype):
    tiny, large = torch.tensor([2.0**-130, 2.0**100], dtype=dtype).tolist()
    rows = CompressedRows(torch.full((3, 48), large, dtype=dtype))
    x_TH = torch.full((2, 16), tiny, dtype=dtype)

    found = cpu_kernels.project_in(x_TH, torch.arange(2), [2], [rows], 2)

    # The products of bfloat16 pairs have no denormal factors.
    zeros = (instruction_set, dtype) == ("avx512_bf16", torch.bfloat16)
    assert torch.equal(found, torch.full((2, 6), 0.0 if zeros else 16 * tiny * large))


@every_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_copy_that_is_no_number_spoils_its_own_results_alone(instruction_set, dtype, bad):
    case = Case(rows=21, hidden=45, tokens=9, parts=(Part(copies=9), Part(copies=9)))
    problem = case.build(dtype)
    before = problem.project_in(cpu_kernels), problem.project_out(cpu_kernels)
    problem.x_TH[4, 44] = bad
    problem.h_NS[4, 20] = bad  # of token 4, by the first job

    after = problem.project_in(cpu_kernels), problem.project_out(cpu_kernels)

    others_N, others_T = problem.token_N != 4, torch.arange(9) != 4
    assert torch.equal(after[0][others_N], before[0][others_N])
    assert torch.equal(after[1][others_T], before[1][others_T])
    assert not after[0][~others_N].isfinite().any()
    assert not after[1][4].isfinite().any()


@every_dtype
def test_nothing_of_earlier_rows_is_left_where_later_ones_are_expanded(instruction_set, dtype):
    spoilt = Case(rows=40, hidden=700, tokens=9, parts=(Part(share=None, copies=9),)).build(dtype)
    spoilt.jobs[0].center.fill_(torch.nan)
    for rows in (1, 2, 3, 5, 17):
        case = Case(rows=rows, hidden=45, tokens=9, parts=(Part(copies=9), Part(copies=2)))
        problem = case.build(dtype)
        assert spoilt.project_in(cpu_kernels).isnan().all()
        assert_sums(problem.project_in(cpu_kernels), sums_in(case, problem))
        assert spoilt.project_out(cpu_kernels).isnan().all()
        assert_sums(problem.project_out(cpu_kernels), sums_out(case, problem))


# What a caller got wrong. Rows [4, 60] of 20 hidden, 3 tokens.


def _whole() -> CompressedRows:
    (rows,) = Case(rows=4, hidden=20, parts=(Part(share=1.0),)).build(torch.float32).jobs
    return rows


def _in(x=None, token=None, counts=(3,), jobs=None, inputs=2) -> None:
    cpu_kernels.project_in(
        torch.randn(3, 20) if x is None else x,
        torch.arange(3) if token is None else token,
        list(counts),
        [_whole()] if jobs is None else jobs,
        inputs,
    )


def _out(h=None, token=None, counts=(3,), jobs=None, inputs=2, tokens=3, hidden=20) -> None:
    cpu_kernels.project_out(
        torch.randn(3, 4) if h is None else h,
        torch.arange(3) if token is None else token,
        list(counts),
        [_whole()] if jobs is None else jobs,
        inputs,
        tokens,
        hidden,
    )


def _changed(**tensors: Tensor | None) -> list[CompressedRows]:
    return [CompressedRows(**(vars(_whole()) | tensors))]


def _restore(out: Tensor | None = None, first_column: int = 0, **tensors: Tensor | None) -> None:
    (rows,) = _changed(**tensors)
    cpu_kernels.restore(rows, torch.empty(4, 60) if out is None else out, first_column)


def _without_rows(operation: str, *arguments: object) -> None:
    getattr(torch.ops.resmoe, operation)(*arguments)


MISTAKES = {
    "centre of another dtype": lambda: _in(jobs=_changed(center=torch.randn(4, 60).double())),
    "centre of fewer columns": lambda: _out(jobs=_changed(center=torch.randn(4, 59))),
    "centre of other rows": lambda: _in(jobs=_changed(center=torch.randn(5, 60)), inputs=2),
    "centre by columns": lambda: _in(jobs=_changed(center=torch.randn(60, 4).T)),
    "centre of one dimension": lambda: _restore(center=torch.randn(4)),
    "bitmap of another dtype": lambda: _restore(bitmap=torch.zeros(4, 8, dtype=torch.int8)),
    "bitmap of fewer columns": lambda: _restore(bitmap=torch.zeros(4, 7, dtype=torch.uint8)),
    "bitmap of other rows": lambda: _restore(bitmap=torch.zeros(3, 8, dtype=torch.uint8)),
    "bitmap with gaps": lambda: _restore(bitmap=torch.zeros(4, 9, dtype=torch.uint8)[:, :8]),
    "bitmap without values": lambda: _restore(values=None),
    "bitmap without offsets": lambda: _restore(row_offsets=None),
    "values of another dtype": lambda: _restore(values=torch.randn(360).bfloat16()),
    "values with gaps": lambda: _restore(values=torch.randn(720)[::2]),
    "values of two dimensions": lambda: _restore(values=torch.randn(360, 1)),
    "fewer values than the offsets say": lambda: _restore(values=torch.randn(239)),
    "offsets below the values": lambda: _restore(row_offsets=torch.arange(5) * 60 - 60),
    "offsets past the values": lambda: _restore(row_offsets=torch.arange(5) * 60 + 2**40),
    "an offset past the values": lambda: _restore(
        row_offsets=torch.tensor([0, 60, 2**40, 180, 240])
    ),
    "offsets of another dtype": lambda: _restore(row_offsets=torch.arange(5).short() * 60),
    "one offset less": lambda: _restore(row_offsets=torch.arange(4) * 60),
    "offsets with gaps": lambda: _restore(row_offsets=(torch.arange(10) * 30)[::2]),
    "neither centre nor residual": lambda: _without_rows(
        "restore", torch.empty(4, 60), None, None, None, None, 0
    ),
    "a job of nothing": lambda: _without_rows(
        "project_in", torch.randn(3, 20), torch.arange(3), [3], *[[None]] * 4, 2, 4
    ),
    "jobs in lists of several lengths": lambda: _without_rows(
        "project_in",
        torch.randn(3, 20),
        torch.arange(3),
        [3],
        [torch.randn(4, 60)],
        *[[]] * 3,
        2,
        4,
    ),
    "output of another dtype": lambda: _restore(torch.empty(4, 60).bfloat16()),
    "output in half precision": lambda: _restore(torch.empty(4, 60).half(), center=None),
    "output by columns": lambda: _restore(torch.empty(60, 4).T),
    "output of other rows": lambda: _restore(torch.empty(5, 60)),
    "output of one dimension": lambda: _restore(torch.empty(60)),
    "columns past the last": lambda: _restore(torch.empty(4, 60), 5),
    "columns before the first": lambda: _restore(torch.empty(4, 10), -5),
    "tokens of another dtype": lambda: _in(torch.randn(3, 20).bfloat16()),
    "tokens in half precision": lambda: _in(torch.randn(3, 20).half()),
    "tokens of more columns": lambda: _in(torch.randn(3, 40)),
    "tokens of one dimension": lambda: _in(torch.randn(20)),
    "tokens of three dimensions": lambda: _in(torch.randn(3, 20, 0)),
    "activations of another dtype": lambda: _out(torch.randn(3, 4).bfloat16()),
    "activations of other rows": lambda: _out(torch.randn(3, 5)),
    "fewer activations than copies": lambda: _out(torch.randn(2, 4)),
    "activations of three dimensions": lambda: _out(torch.randn(3, 4, 0)),
    "token numbers of 32 bits": lambda: _in(token=torch.arange(3).int()),
    "token numbers with gaps": lambda: _in(token=torch.arange(6)[::2]),
    "token numbers of two dimensions": lambda: _in(token=torch.empty(3, 0).long()),
    "a token past the last": lambda: _in(token=torch.tensor([0, 1, 3])),
    "a token before the first": lambda: _out(token=torch.tensor([-1, 0, 1])),
    "a token past the output": lambda: _out(tokens=2),
    "more copies than token numbers": lambda: _in(counts=(4,)),
    "fewer copies than token numbers": lambda: _out(counts=(2,)),
    "a negative number of copies": lambda: _in(counts=(4, -1), jobs=[_whole(), _whole()]),
    "fewer jobs than counts": lambda: _in(counts=(1, 2)),
    "more jobs than counts": lambda: _out(jobs=[_whole(), _whole()]),
    "jobs of several sizes": lambda: _in(
        counts=(1, 2), jobs=[_whole(), CompressedRows(torch.randn(3, 60))]
    ),
    "no inputs": lambda: _in(inputs=0),
    "three inputs": lambda: _in(torch.randn(3, 10), inputs=3),
    "inputs below none": lambda: _out(inputs=-1),
    "an output of more columns": lambda: _out(hidden=21),
    "an output of fewer columns than none": lambda: _out(hidden=-20),
    "an output of fewer rows than none": lambda: _out(
        torch.randn(0, 4), torch.arange(0), counts=(0,), tokens=-1
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_error_not_a_crash(kernels, mistake):
    with pytest.raises(RuntimeError):
        MISTAKES[mistake]()


def test_what_the_mistakes_are_made_of_is_right(kernels):
    _restore()
    _in()
    _out()
