"""Rotating tokens and restoring quantised rows in the Triton backend.

Legend: T tokens, H hidden, R rows, C columns, S rows of a shard, D columns of a matrix, P bytes of
a stream.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.codecs import EncodedMatrix, QuantizedMatrix
from resmoe_dist.codecs.rotation import rotate, rotate_back
from resmoe_dist.kernels import LayerWeights
from tests.kernels.problems import Problem
from tests.kernels.quantized_problems import (
    CODING,
    QuantizedCase,
    QuantizedExpert,
    decoded,
    quantized_cases,
    with_dense_centers,
)
from tests.kernels.triton_runs import (
    DTYPES,
    Run,
    backend_of,
    memory_of,
    restore,
)

# --- Rotation ---


def rotated(x_TH: Tensor, back: bool) -> Tensor:
    """By the kernel of a backend for so many hidden columns."""
    layer = QuantizedCase(rows=1, hidden=x_TH.shape[1], inputs=1).build(x_TH.dtype).layer
    layer = LayerWeights(
        layer.shape,
        *(_on(matrices, x_TH.device) for matrices in (layer.residuals, layer.centers)),
        layer.center_of,
        layer.activation,
    )
    backend = backend_of(layer)
    return backend.rotate_back(x_TH) if back else backend.rotate(x_TH)


def _on(matrices: tuple[EncodedMatrix, ...], device: torch.device) -> tuple[EncodedMatrix, ...]:
    return tuple(matrix.to(device) for matrix in matrices)


@pytest.mark.parametrize("back", [False, True], ids=["rotate", "rotate back"])
@pytest.mark.parametrize("hidden", [24, 16, 48, 2880, 4096])
def test_tokens_are_rotated_as_by_the_codec(run, hidden, back):
    x_TH = torch.randn(3, hidden)

    found = run(rotated, x_TH, back)

    torch.testing.assert_close(found, (rotate_back if back else rotate)(x_TH), rtol=0, atol=1e-5)


# --- Restoring ---


def check_restored(
    run: Run, problem: Problem, expert: int, rows: slice, columns: slice, transposed: bool = False
) -> None:
    """Compare any rows and columns, written into the middle of a larger tensor."""
    layer = problem.layer
    exact_SD = decoded(layer.residuals[expert])
    if layer.center_of[expert] >= 0:
        exact_SD = exact_SD + decoded(layer.centers[layer.center_of[expert]])
    exact_RC = exact_SD[rows, columns]
    R, C = exact_RC.shape
    memory = torch.full((C + 2, R + 3) if transposed else (R + 2, C + 3), 7.0, dtype=layer.dtype)
    out = memory[1:-1, 2:-1].T if transposed else memory[1:-1, 2:-1]

    found = run(restore, layer, out, expert, rows.start, columns.start)

    # Errors of a rotation's float32 sums are relative to the whole row; rounding, by half a unit in
    # the last place, is relative to the entry. The interpreter cuts off bits of bfloat16.
    eps = torch.finfo(layer.dtype).eps
    rounding = eps if run.is_interpreted and layer.dtype == torch.bfloat16 else eps / 2
    bound = 1e-6 * abs(exact_SD).max() + 1.01 * rounding * abs(exact_RC)
    assert (abs(found.double().numpy() - exact_RC) <= bound).all()
    around = memory_of(found).view_as(memory)
    (around[1:-1, 2:-1].T if transposed else around[1:-1, 2:-1]).fill_(7.0)
    assert torch.equal(around, memory)


@given(
    case=quantized_cases(st.just(0)),
    row_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    dense_centers=st.booleans(),
    transposed=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=15)
def test_any_rows_and_columns_are_restored(
    run, case, row_bias, dtype, dense_centers, transposed, data
):
    problem = replace(case, row_bias=row_bias, rows=min(case.rows, 9)).build(dtype)
    if dense_centers:
        problem = with_dense_centers(problem)
    layer = problem.layer
    ranges = []
    for size in (layer.rows, layer.shape.columns):
        first = data.draw(st.integers(0, size - 1))
        ranges.append(slice(first, data.draw(st.integers(first + 1, size))))

    check_restored(run, problem, layer.num_experts - 1, *ranges, transposed)


@pytest.mark.parametrize("hidden", [2880, 2048])
def test_long_rows_are_restored(run, hidden):
    problem = QuantizedCase(rows=3, hidden=hidden, inputs=1).build(torch.float32)

    check_restored(run, problem, 0, slice(1, 3), slice(hidden - 70, 2 * hidden - 5))


def test_restoring_no_columns_does_nothing(run):
    layer = QuantizedCase(rows=3, hidden=16).build(torch.float32).layer

    assert run(restore, layer, torch.empty(3, 0), 0, 0, 5).shape == (3, 0)


@pytest.mark.parametrize("before", [0, 1, 2, 3])
@given(coding=CODING)
@settings(deadline=None, max_examples=3)
def test_bits_around_a_row_do_not_matter(run, before, coding):
    # 36 entries end in the middle of an octet's bytes, and rows begin at every byte of a word.
    case = QuantizedCase(
        rows=5, hidden=36, inputs=1, experts=(QuantizedExpert(coding, center=None),)
    )
    problem = case.build(torch.float32)
    matrix = problem.layer.residuals[0]
    R, P = matrix.codes.shape
    memory = torch.full((R + 2, P + before + 1), 255, dtype=torch.uint8)
    codes = memory[1:-1, before:-1].copy_(matrix.codes)
    tensors = matrix.tensors() | {"codes": codes}
    moved = QuantizedMatrix((R, matrix.columns), tensors, torch.float32)
    problem = problem._replace(layer=replace(problem.layer, residuals=(moved,)))

    check_restored(run, problem, 0, slice(0, R), slice(0, matrix.columns))


def restored_far_rows(out_RD: Tensor, layer: LayerWeights) -> Tensor:
    """Restores two rows whose codes are more than 2^31 bytes apart. Most of the memory between is
    never touched."""
    matrix = layer.residuals[0]
    distance = (1 << 31) + 3
    memory = torch.empty(distance + matrix.codes.shape[1], dtype=torch.uint8, device=out_RD.device)
    codes = memory.as_strided(matrix.codes.shape, (distance, 1)).copy_(matrix.codes)
    tensors = matrix.tensors() | {"codes": codes}
    far = QuantizedMatrix((matrix.rows, matrix.columns), tensors, matrix.dtype)
    backend_of(replace(layer, residuals=(far,))).restore(0, out_RD)
    return out_RD


def test_rows_may_be_far_apart(run):
    case = QuantizedCase(rows=2, hidden=16, experts=(QuantizedExpert(center=None),))
    layer = case.build(torch.float32).layer

    found = run(restored_far_rows, torch.empty(2, 48), layer)

    expected = torch.from_numpy(decoded(layer.residuals[0])).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
