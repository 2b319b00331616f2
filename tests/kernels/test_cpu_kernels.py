"""The C++ kernels on every instruction set of this machine, against exact results.

Restoring is compared exactly, as numbers: zeros of either sign are equal, and so are NaNs. Products
are float32 sums of terms that are exact (bfloat16) or rounded once: see `assert_sums`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.codecs import DenseMatrix, PrunedMatrix
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.kernels import LayerWeights
from resmoe_dist.kernels.cpu.backend import (
    DTYPES,
    CpuBackend,
    instruction_sets,
    use_instruction_set,
)
from resmoe_dist.kernels.reference import ReferenceBackend
from tests.kernels.problems import (
    CASES,
    FLUSHING_SETS,
    INSTRUCTION_SETS,
    Case,
    Expert,
    PlainActivation,
    Problem,
    assert_equal_numbers,
    assert_sums,
    draw_columns,
    pruned,
    restored,
    sums_in,
    sums_out,
)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_part = pytest.mark.parametrize("part", ["whole", "residual"])


def cpu(problem: Problem) -> CpuBackend:
    return CpuBackend(problem.layer)


def test_instruction_sets_are_ordered_and_all_tested_here(kernels):
    found = instruction_sets()

    assert found == [name for name in INSTRUCTION_SETS if name in found]
    assert found[-1] == "portable"


def test_refuses_an_unknown_instruction_set(kernels):
    with pytest.raises(RuntimeError, match="does not support instruction set mmx"):
        use_instruction_set("mmx")


@every_dtype
@given(case=CASES, data=st.data())
@settings(deadline=None)
def test_restores_the_same_numbers_as_the_reference(instruction_set, dtype, case, data):
    first, columns = draw_columns(case, data)
    problem = case.build(dtype)
    for expert in range(problem.layer.num_experts):
        expected = restored(ReferenceBackend(problem.layer), problem, expert, columns, first)

        assert_equal_numbers(restored(cpu(problem), problem, expert, columns, first), expected)


@every_part
@every_dtype
@given(case=CASES)
@settings(deadline=None)
def test_half_products_are_exact(instruction_set, dtype, part, case):
    problem = case.build(dtype)

    assert_sums(problem.project_in(cpu(problem), part), sums_in(problem, part))
    assert_sums(problem.project_out(cpu(problem), part), sums_out(problem, part))


@every_dtype
def test_half_products_with_centres_are_exact(instruction_set, dtype):
    experts = (Expert(center=0, copies=3), Expert(center=1, copies=7, repeated=True))
    problem = Case(
        rows=21, hidden=150, tokens=9, experts=experts, first_row=2, gap=3, unused_centers=1
    ).build(dtype)
    token_C, offsets_G = torch.tensor([0, 4, 8, 1, 1]), torch.tensor([0, 3, 5, 5])
    centers = [DenseMatrix.of(center.weight.contiguous()) for center in problem.layer.centers]
    # The same centres as experts without residuals.
    empty = pruned(np.zeros((centers[0].rows, centers[0].columns), bool), torch.empty(0).to(dtype))
    layer = replace(
        problem.layer, residuals=(empty,) * 3, centers=tuple(centers), center_of=(0, 1, 2)
    )
    routed = replace(problem.routed, token_N=token_C, offsets_L=offsets_G)
    same = Problem(layer, routed, problem.h_NS[:5], problem.rows)
    backend, x_TH = cpu(problem), problem.routed.x_RH

    found_in = backend.project_in("center", x_TH, routed.copies, problem.rows)
    found_out = backend.project_out("center", same.h_NS, routed.copies, problem.rows, 9)

    assert_sums(found_in, sums_in(same))
    assert_sums(found_out, sums_out(same))


def test_copies_after_the_last_offset_are_ignored(instruction_set):
    problem = Case(rows=5, hidden=20, tokens=4, experts=(Expert(copies=4),)).build(torch.float32)
    expected = problem.project_in(cpu(problem)), problem.project_out(cpu(problem))
    routed = problem.routed
    dropped = problem._replace(
        routed=replace(routed, token_N=torch.cat([routed.token_N, torch.tensor([0, 3])])),
        h_NS=torch.cat([problem.h_NS, torch.full((2, 5), torch.nan)]),
    )

    found = dropped.project_in(cpu(problem)), dropped.project_out(cpu(problem))

    assert torch.equal(found[0][:4], expected[0])
    assert not found[0][4:].any()
    assert torch.equal(found[1], expected[1])


LAYER = Case(
    rows=300,
    hidden=512,
    tokens=40,
    experts=(
        Expert(share=0.0, copies=40),
        *(Expert(center=None, copies=10, repeated=True) for _ in range(8)),
    ),
)
LARGE = {
    "a layer": LAYER,
    "long rows": Case(
        rows=37,
        hidden=2100,
        extra=2,
        tokens=40,
        experts=(
            Expert(copies=40),
            Expert(center=1, copies=3),
            Expert(center=None, copies=33, repeated=True),
        ),
    ),
    "many rows of one centre": Case(
        rows=389,
        hidden=90,
        inputs=1,
        tokens=40,
        experts=(Expert(copies=40), Expert(copies=5), Expert(copies=20), Expert(share=0.0)),
    ),
    # More than 4 MB of sums.
    "many tokens": Case(
        rows=9,
        hidden=2050,
        tokens=530,
        experts=(Expert(copies=530), Expert(copies=40, repeated=True)),
    ),
}


@pytest.mark.parametrize("name", LARGE)
@every_dtype
def test_large_problems_are_exact(instruction_set, dtype, name):
    problem = LARGE[name].build(dtype)

    assert_sums(problem.project_in(cpu(problem)), sums_in(problem))
    assert_sums(problem.project_out(cpu(problem)), sums_out(problem))


@pytest.mark.parametrize("name", LARGE)
@every_dtype
def test_the_number_of_threads_changes_only_the_order_of_sums(
    instruction_set, dtype, threads, name
):
    problem = LARGE[name].build(dtype)
    sums, backend = sums_out(problem), cpu(problem)
    alone = problem.project_in(backend)
    for count in (2, 4):
        threads(count)
        again = problem.project_out(backend)

        assert torch.equal(problem.project_in(backend), alone)
        assert_sums(again, sums)
        assert torch.equal(problem.project_out(backend), again)


@every_dtype
def test_more_threads_than_rows_work(instruction_set, dtype, threads):
    case = Case(rows=3, hidden=50, tokens=9, experts=(Expert(copies=9), Expert(copies=4)))
    problem = case.build(dtype)
    threads(4)

    assert_sums(problem.project_in(cpu(problem)), sums_in(problem))
    assert_sums(problem.project_out(cpu(problem)), sums_out(problem))


@every_dtype
def test_zero_rows_give_zeros(instruction_set, dtype):
    experts = (Expert(copies=9), Expert(copies=4))
    problem = Case(rows=0, last_rows=2, hidden=45, tokens=9, experts=experts).build(dtype)

    assert problem.project_in(cpu(problem)).shape == (13, 0)
    assert torch.equal(problem.project_out(cpu(problem)), torch.zeros(9, 45))


# Outputs above 16 MB are written past the caches if they are aligned.
@pytest.mark.parametrize("aligned", [True, False])
@every_dtype
def test_large_outputs_are_restored_on_any_number_of_threads(
    instruction_set, dtype, aligned, threads
):
    case = Case(rows=(17 << 20) // (dtype.itemsize * 3 * 2048) + 1, hidden=2048)
    problem = case.build(dtype)
    expected = restored(ReferenceBackend(problem.layer), problem, 0, case.columns - 3)
    memory = torch.empty(case.rows * case.columns + 64, dtype=dtype)
    first = -memory.data_ptr() % 64 // dtype.itemsize + (0 if aligned else 5)
    out = memory[first : first + case.rows * case.columns].view(case.rows, -1)[:, :-3]
    for count in (1, 3):
        threads(count)
        out.fill_(99)
        cpu(problem).restore(0, out)

        assert torch.equal(out, expected)


@every_dtype
def test_restoring_into_part_of_a_matrix_leaves_the_rest_alone(instruction_set, dtype):
    problem = Case(rows=9, hidden=29, extra=1).build(dtype)
    whole = torch.full((9, 60), 99, dtype=dtype)

    cpu(problem).restore(0, whole[:, 7:51], 0, 11)

    expected = restored(ReferenceBackend(problem.layer), problem, 0, 44, 11)
    assert torch.equal(whole[:, 7:51], expected)
    assert bool((whole[:, :7] == 99).all())
    assert bool((whole[:, 51:] == 99).all())


def extremes(dtype: torch.dtype) -> list[float]:
    """Zeros, denormal, smallest and largest numbers, infinities, NaN, and ordinary numbers."""
    finfo = torch.finfo(dtype)
    smallest = finfo.tiny * finfo.eps
    positive = [0.0, smallest, 3 * smallest, finfo.tiny, 1.5 * finfo.tiny]
    positive += [1.0, 1 + finfo.eps, 3.0, finfo.max / 2, finfo.max, torch.inf]
    return [*positive, *(-value for value in positive), torch.nan]


def layer_of(center: Tensor | None, residual: PrunedMatrix) -> Problem:
    """One two-layer expert whose rows have 2·H columns."""
    shape = ExpertShape(residual.rows, residual.columns // 2, gated=False)
    centers = () if center is None else (DenseMatrix.of(center),)
    center_of = (-1 if center is None else 0,)
    layer = LayerWeights(shape, (residual,), centers, center_of, PlainActivation())
    problem = Case(rows=residual.rows, hidden=shape.hidden, inputs=1).build(residual.dtype)
    return problem._replace(layer=layer)


def all_sums(dtype: torch.dtype, mask: np.ndarray | None = None) -> tuple[Tensor, PrunedMatrix]:
    """A centre and a residual that add every extreme number to every other.

    The columns fill whole vector registers and a rest. mask: entries of the residual that are kept.
    """
    values = torch.tensor(extremes(dtype), dtype=dtype)
    count = len(values)
    residual = values.repeat(count, 4)
    if mask is None:
        mask = np.ones(residual.shape, bool)
    center = values.unsqueeze(1).repeat(1, 4 * count)
    return center, pruned(mask, residual[torch.from_numpy(mask)])


def flush_denormals(numbers: Tensor) -> Tensor:
    """Zeros in place of denormal numbers."""
    return torch.where(numbers.abs() < torch.finfo(numbers.dtype).tiny, 0, numbers)


@every_dtype
def test_extreme_numbers_are_added_like_others(instruction_set, dtype):
    center, residual = all_sums(dtype)
    problem = layer_of(center, residual)
    columns = center.shape[1]
    if instruction_set in FLUSHING_SETS and dtype == torch.bfloat16:
        # Its adding instructions treat denormal numbers as zeros, both inputs and results.
        tensors = residual.tensors() | {"values": flush_denormals(residual.values)}
        flushed = PrunedMatrix((residual.rows, residual.columns), tensors, dtype)
        expected_problem = layer_of(flush_denormals(center), flushed)
        reference = ReferenceBackend(expected_problem.layer)
        expected = flush_denormals(restored(reference, expected_problem, 0, columns))
    else:
        expected = restored(ReferenceBackend(problem.layer), problem, 0, columns)

    assert_equal_numbers(restored(cpu(problem), problem, 0, columns), expected)


@every_dtype
def test_dropped_entries_keep_the_bits_of_the_centre(instruction_set, dtype):
    center, every = all_sums(dtype)
    mask = np.random.default_rng(0).random(center.shape) < 0.5
    problem = layer_of(center, all_sums(dtype, mask)[1])
    full = layer_of(center, every)
    columns = center.shape[1]
    added = restored(cpu(full), full, 0, columns)

    found = restored(cpu(problem), problem, 0, columns)

    kept = torch.from_numpy(mask)
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    assert torch.equal(found[~kept].view(bits), center[~kept].view(bits))
    assert_equal_numbers(found[kept], added[kept])


@every_dtype
def test_extreme_numbers_of_a_centre_or_residual_alone_stay_the_same(instruction_set, dtype):
    center, residual = all_sums(dtype)
    nothing = all_sums(dtype, np.zeros(center.shape, bool))[1]
    for problem in (layer_of(center, nothing), layer_of(None, residual)):
        expected = restored(ReferenceBackend(problem.layer), problem, 0, center.shape[1])

        assert_equal_numbers(restored(cpu(problem), problem, 0, center.shape[1]), expected)


@every_dtype
def test_denormal_numbers_are_multiplied_or_count_as_zeros(instruction_set, dtype):
    tiny, large = torch.tensor([2.0**-130, 2.0**100], dtype=dtype).tolist()
    case = Case(rows=3, hidden=16, tokens=2, experts=(Expert(copies=2, share=0.0),))
    problem = case.build(dtype)
    problem.layer.centers[0].weight.fill_(large)
    problem.routed.x_RH.fill_(tiny)

    found = problem.project_in(cpu(problem))

    # The instruction for bfloat16 pairs treats denormal factors as zeros.
    zeros = instruction_set in FLUSHING_SETS and dtype == torch.bfloat16
    assert torch.equal(found, torch.full((2, 6), 0.0 if zeros else 16 * tiny * large))


@every_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_in_one_copy_reaches_only_its_own_results(instruction_set, dtype, bad):
    case = Case(rows=21, hidden=45, tokens=9, experts=(Expert(copies=9), Expert(copies=9)))
    problem = case.build(dtype)
    backend, token_N = cpu(problem), problem.routed.token_N
    before = problem.project_in(backend), problem.project_out(backend)
    problem.routed.x_RH[4, 44] = bad
    problem.h_NS[4, 20] = bad  # of token 4, for the first expert

    after = problem.project_in(backend), problem.project_out(backend)

    others_N, others_T = token_N != 4, torch.arange(9) != 4
    assert torch.equal(after[0][others_N], before[0][others_N])
    assert torch.equal(after[1][others_T], before[1][others_T])
    assert not after[0][~others_N].isfinite().any()
    assert not after[1][4].isfinite().any()


@every_dtype
def test_buffers_hold_nothing_of_earlier_calls(instruction_set, dtype):
    spoilt = Case(rows=40, hidden=700, tokens=9, experts=(Expert(share=0.0, copies=9),)).build(
        dtype
    )
    spoilt.layer.centers[0].weight.fill_(torch.nan)
    for rows in (1, 2, 3, 5, 17):
        case = Case(rows=rows, hidden=45, tokens=9, experts=(Expert(copies=9), Expert(copies=2)))
        problem = case.build(dtype)
        assert spoilt.project_in(cpu(spoilt)).isnan().all()
        assert_sums(problem.project_in(cpu(problem)), sums_in(problem))
        assert spoilt.project_out(cpu(spoilt)).isnan().all()
        assert_sums(problem.project_out(cpu(problem)), sums_out(problem))
