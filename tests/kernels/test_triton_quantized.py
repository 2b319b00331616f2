"""Products of the Triton backend for quantised layers, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmoe_dist.codecs import DenseMatrix
from resmoe_dist.kernels import LayerWeights
from tests.kernels.problems import ROUNDING, Problem, assert_sums, sums_in, sums_out
from tests.kernels.quantized_problems import (
    CODINGS,
    Coding,
    QuantizedCase,
    QuantizedExpert,
    assert_close,
    decoded,
    quantized_cases,
    quantized_outputs,
    with_dense_centers,
)
from tests.kernels.triton_runs import (
    DTYPES,
    Run,
    half_products,
    mlp,
    with_dropped_copies,
)

# Relative errors in the Euclidean norm. Float32 sums err by some 2^-24. In 16 bits, rotated tokens,
# activations and the rows of many copies are rounded to up to 2^-9 each; the interpreter cuts off
# bits of rotated bfloat16 tokens, up to 2^-7.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}

shared_or_not = pytest.mark.parametrize("share_center", [True, False], ids=["shared", "tiled"])


def check_mlp(run: Run, problem: Problem, share_center: bool, **options: int) -> None:
    found = run(mlp, problem, share_center, **options)

    assert_close(found, quantized_outputs(problem), TOLERANCE[problem.layer.dtype])


def experts_of(*copies: int) -> tuple[QuantizedExpert, ...]:
    """Experts of different codings, with one of two centres or none."""
    centers = (0, 1, None)
    return tuple(
        QuantizedExpert(CODINGS[-1 - i % 9], center=centers[i % 3], copies=count, repeated=True)
        for i, count in enumerate(copies)
    )


def exact_layer(layer: LayerWeights, part: str) -> LayerWeights:
    """Dense experts in float64 that are what a part's jobs multiply."""
    experts = []
    for residual, center in zip(layer.residuals, layer.center_of, strict=True):
        matrices = [] if part == "center" else [residual]
        if part != "residual" and center >= 0:
            matrices.append(layer.centers[center])
        exact_SD = sum(decoded(matrix) for matrix in matrices)
        experts.append(DenseMatrix.of(torch.from_numpy(exact_SD)))
    return replace(layer, residuals=tuple(experts), centers=(), center_of=(-1,) * len(experts))


@pytest.mark.parametrize("part", ["whole", "residual", "center"])
@given(
    case=quantized_cases(st.sampled_from([0, 1, 2, 5, 40])),
    dtype=st.sampled_from(DTYPES),
    dense_centers=st.booleans(),
)
@settings(deadline=None, max_examples=5)
def test_half_products_are_exact(run, part, case, dtype, dense_centers):
    # The products are what they are whether entries are rotated or not.
    problem = replace(case, rotated=False, rows=min(case.rows, 9)).build(dtype)
    if part == "center":
        # Centre i gets expert i's copies.
        layer = problem.layer
        layer = replace(layer, centers=layer.residuals, center_of=tuple(range(layer.num_experts)))
        problem = problem._replace(layer=layer)
    if dense_centers:
        problem = with_dense_centers(problem)
    exact = problem._replace(layer=exact_layer(problem.layer, part))

    found_in, found_out = run(half_products, problem, part)

    # Tensor cores multiply rows that were rounded.
    exactly = run.is_interpreted or dtype == torch.float32
    rounding = ROUNDING if exactly else ROUNDING + torch.finfo(dtype).eps / 2
    assert_sums(found_in, sums_in(exact), rounding)
    assert_sums(found_out, sums_out(exact), rounding)


@given(case=quantized_cases(st.sampled_from([0, 1, 2, 5, 40])), share_center=st.booleans())
@settings(deadline=None, max_examples=8)
def test_mlps_are_exact(run, case, share_center):
    check_mlp(run, replace(case, rows=min(case.rows, 9)).build(torch.float32), share_center)


@shared_or_not
@pytest.mark.parametrize("coding", [Coding(8, "scalar"), Coding(4), Coding(3, group=None)], ids=str)
def test_one_layer_may_have_every_coding(run, coding, share_center):
    # Rows and projections begin at every bit of a word.
    case = QuantizedCase(
        rows=9,
        hidden=95,
        tokens=5,
        experts=tuple(QuantizedExpert(coding, copies=2) for coding in CODINGS),
        center_coding=coding,
    )

    check_mlp(run, case.build(torch.float32), share_center)


@shared_or_not
@pytest.mark.parametrize("copies", [(2, 0, 1), (9, 0, 20)], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mlps_in_16_bits_are_right(run, dtype, copies, share_center):
    case = QuantizedCase(rows=9, hidden=96, tokens=20, experts=experts_of(*copies))

    check_mlp(run, case.build(dtype), share_center)


@shared_or_not
@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "not rotated"])
def test_dense_centres_are_added(run, rotated, share_center):
    case = QuantizedCase(
        rows=5,
        hidden=48,
        row_bias=True,
        rotated=rotated,
        tokens=5,
        experts=experts_of(2, 5, 1, 0, 4),
    )

    check_mlp(run, with_dense_centers(case.build(torch.float32)), share_center)


SIZES = {
    "many hidden": QuantizedCase(rows=2, hidden=2880, inputs=1, tokens=2, experts=experts_of(1, 2)),
    "many rows": QuantizedCase(rows=70, hidden=36, tokens=3, experts=experts_of(3, 1)),
    "many copies": QuantizedCase(rows=3, hidden=20, tokens=80, experts=experts_of(80, 0, 33)),
    "many experts": QuantizedCase(rows=3, hidden=32, tokens=4, experts=experts_of(*[1, 0, 2] * 4)),
    "biases": QuantizedCase(
        rows=3, hidden=32, row_bias=True, tokens=4, experts=experts_of(1, 4, 2)
    ),
    "no copies": QuantizedCase(rows=3, hidden=32, tokens=4, experts=experts_of(0, 0)),
    "no tokens": QuantizedCase(rows=3, hidden=32, tokens=0, experts=experts_of(0, 0)),
    "no rows": QuantizedCase(rows=0, last_rows=2, hidden=32, tokens=4, experts=experts_of(1, 4)),
}


@pytest.mark.parametrize("name", SIZES)
def test_mlps_of_every_size_are_exact(run, name):
    # Rows in several blocks.
    check_mlp(run, SIZES[name].build(torch.float32), True, product_bytes=1)


@pytest.mark.parametrize("group", [16, 48])
def test_groups_may_be_any_number_of_octets(run, group):
    case = QuantizedCase(
        rows=5, hidden=112, tokens=2, experts=(QuantizedExpert(Coding(group=group)),)
    )

    check_mlp(run, case.build(torch.float32), False)


def test_tensor_parallel_ranks_add_up_to_the_whole(run):
    problem = QuantizedCase(rows=11, hidden=80, tokens=4, experts=experts_of(4, 1, 2)).build(
        torch.float32
    )
    layer = problem.layer
    parts = torch.zeros(4, 80)
    for rows in ((0, 3), (3, 7), (7, 11)):
        residuals, centers = (
            tuple(matrix.slice_rows(*rows) for matrix in matrices)
            for matrices in (layer.residuals, layer.centers)
        )
        part = problem._replace(layer=replace(layer, residuals=residuals, centers=centers))
        parts += run(mlp, part, True)

    assert_close(parts, quantized_outputs(problem), TOLERANCE[torch.float32])


def test_dropped_copies_add_nothing(run):
    problem = QuantizedCase(rows=5, hidden=48, tokens=4, experts=experts_of(2, 4)).build(
        torch.float32
    )

    found = run(mlp, with_dropped_copies(problem, 3), True)

    assert_close(found, quantized_outputs(problem), TOLERANCE[torch.float32])


@shared_or_not
@pytest.mark.parametrize("copies", [(2, 1), (9, 9)], ids=["few", "many"])
def test_a_nan_in_one_token_reaches_only_its_own_result(run, copies, share_center):
    problem = QuantizedCase(rows=5, hidden=48, tokens=9, experts=experts_of(*copies)).build(
        torch.float32
    )
    token = int(problem.routed.token_N[0])
    before = run(mlp, problem, share_center)
    problem.routed.x_RH[token, 7] = torch.nan

    after = run(mlp, problem, share_center)

    others_T = torch.arange(9) != token
    assert torch.equal(after[others_T], before[others_T])
    assert not after[token].isfinite().any()


def test_equal_mlps_give_equal_bits(run):
    problem = QuantizedCase(rows=9, hidden=48, tokens=6, experts=experts_of(6, 6, 6, 6)).build(
        torch.float32
    )

    assert torch.equal(run(mlp, problem, True), run(mlp, problem, True))
