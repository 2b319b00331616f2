"""What every codec computes with an expert, against its decoded matrix in float64.

Legend: R rows, D columns, H hidden, T tokens, N copies, J jobs.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from resmoe_dist.codecs import CODECS, EncodedResidual, LowRankResidual, Weights

ROWS, HIDDEN, TOKENS = 11, 9, 7
# Two inputs, an output, and two columns of biases.
COLUMNS = 3 * HIDDEN + 2
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
with_and_without_center = pytest.mark.parametrize("centered", [False, True])


class Expert(NamedTuple):
    """A centre or none, a residual, their sum and the sum of their magnitudes in float64."""

    center: Tensor | None
    residual: EncodedResidual
    exact: Tensor
    magnitude: Tensor


def make_expert(codec: type[EncodedResidual], dtype: torch.dtype, centered: bool) -> Expert:
    residual_RD = torch.randn(ROWS, COLUMNS)
    # Rows of which `pruned` keeps nothing, at both ends and in between.
    residual_RD[[0, 3, 4, ROWS - 1]] *= 1e-3
    residual = codec.encode(residual_RD, keep=0.4, dtype=dtype)
    center = torch.randn(ROWS, COLUMNS).to(dtype) if centered else None
    doubled = copy.deepcopy(residual).double()
    exact = doubled.decode()
    magnitude = exact.abs()
    if isinstance(doubled, LowRankResidual):
        magnitude = doubled.left.abs() @ doubled.right.abs()
    if center is not None:
        exact = exact + center.double()
        magnitude = magnitude + center.double().abs()
    return Expert(center, residual, exact, magnitude)


def rounding(dtype: torch.dtype) -> float:
    """How far a result may be off, relative to the sum of the magnitudes that it is made of.

    Three roundings: of the residual's entries or its first product, of the sum or product with the
    centre, and of the result. In float32 sums are rounded too: sixteen.
    """
    times = 16 if dtype == torch.float32 else 3
    return times * torch.finfo(dtype).eps / 2


def assert_close(found: Tensor, exact: Tensor, allowed: Tensor) -> None:
    assert found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= allowed).all())


@every_codec
@every_dtype
@with_and_without_center
def test_any_rows_and_columns_are_restored(codec, dtype, centered):
    expert = make_expert(codec, dtype, centered)
    for first, stop in ((0, ROWS), (0, 4), (2, 7), (3, 5), (ROWS - 1, ROWS), (5, 5)):
        for column, end in ((0, COLUMNS), (0, 1), (HIDDEN, 2 * HIDDEN), (13, COLUMNS), (4, 4)):
            # As a part of something larger, as experts are restored into a workspace.
            out = torch.full((stop - first, end - column + 3), 7.0, dtype=dtype)[:, : end - column]
            part = slice(first, stop), slice(column, end)

            expert.residual.restore(expert.center, out, first, column)

            allowed = rounding(dtype) * expert.magnitude[part]
            assert out.dtype == dtype
            assert_close(out, expert.exact[part], allowed)


@every_codec
@every_dtype
def test_restoring_slices_gives_their_rows(codec, dtype):
    expert = make_expert(codec, dtype, centered=True)
    part = expert.residual.slice_rows(2, 9).slice_rows(1, 6)
    out = torch.empty(3, COLUMNS, dtype=dtype)

    part.restore(expert.center[3:8], out, 2)

    assert_close(out, expert.exact[5:8], rounding(dtype) * expert.magnitude[5:8])


@every_codec
@every_dtype
@pytest.mark.parametrize("column", [0, HIDDEN, 5])
def test_multiplying_is_a_product_with_some_columns(codec, dtype, column):
    expert = make_expert(codec, dtype, centered=False)
    x_TH = torch.randn(TOKENS, HIDDEN).to(dtype)
    part = slice(column, column + HIDDEN)

    found = expert.residual.multiply(x_TH, column)

    allowed = rounding(dtype) * (x_TH.double().abs() @ expert.magnitude[:, part].T)
    assert_close(found, x_TH.double() @ expert.exact[:, part].T, allowed)


@every_codec
@every_dtype
@pytest.mark.parametrize("column", [0, 2 * HIDDEN, 5])
def test_multiplying_back_is_a_product_with_some_columns(codec, dtype, column):
    expert = make_expert(codec, dtype, centered=False)
    h_TR = torch.randn(TOKENS, ROWS).to(dtype)
    part = slice(column, column + HIDDEN)

    found = expert.residual.multiply_back(h_TR, column, HIDDEN)

    allowed = rounding(dtype) * (h_TR.double().abs() @ expert.magnitude[:, part])
    assert_close(found, h_TR.double() @ expert.exact[:, part], allowed)


class Job(NamedTuple):
    """Weights, the same in float64, and the tokens of the copies that are multiplied by them."""

    weights: Weights
    exact: Tensor
    magnitude: Tensor
    tokens: list[int]


def make_jobs(codec: type[EncodedResidual], dtype: torch.dtype) -> list[Job]:
    """A centre alone, a residual alone, both, and weights without copies; tokens repeat."""
    both, alone, unused = (make_expert(codec, dtype, centered) for centered in (True, False, True))
    center = torch.randn(ROWS, COLUMNS).to(dtype)
    return [
        Job(Weights(center, None), center.double(), center.double().abs(), list(range(TOKENS))),
        Job(Weights(None, alone.residual), alone.exact, alone.magnitude, [5, 0, 5]),
        Job(Weights(unused.center, unused.residual), unused.exact, unused.magnitude, []),
        Job(Weights(both.center, both.residual), both.exact, both.magnitude, [2, 3, 6, 3]),
    ]


@every_codec
@every_dtype
@pytest.mark.parametrize("inputs", [1, 2])
def test_products_on_the_way_in_are_with_the_first_columns(codec, dtype, inputs):
    jobs = make_jobs(codec, dtype)
    x_TH = torch.randn(TOKENS, HIDDEN).to(dtype)
    counts_J = [len(job.tokens) for job in jobs]
    token_N = torch.tensor([token for job in jobs for token in job.tokens])

    found = codec.project_in(x_TH, token_N, counts_J, [job.weights for job in jobs], inputs)

    exact, allowed = [], []
    for job in jobs:
        x_nH = x_TH[job.tokens].double()
        parts = [slice(i * HIDDEN, (i + 1) * HIDDEN) for i in range(inputs)]
        exact.append(torch.cat([x_nH @ job.exact[:, part].T for part in parts], 1))
        allowed.append(torch.cat([x_nH.abs() @ job.magnitude[:, part].T for part in parts], 1))
    assert found.dtype == torch.float32
    assert_close(found, torch.cat(exact), rounding(dtype) * torch.cat(allowed))


@every_codec
@every_dtype
@pytest.mark.parametrize("inputs", [1, 2])
def test_products_on_the_way_out_are_with_the_next_and_add_up_per_token(codec, dtype, inputs):
    jobs = make_jobs(codec, dtype)
    counts_J = [len(job.tokens) for job in jobs]
    token_N = torch.tensor([token for job in jobs for token in job.tokens])
    h_NR = torch.randn(len(token_N), ROWS).to(dtype)
    weights = [job.weights for job in jobs]

    # One token more than any copy is of.
    found = codec.project_out(h_NR, token_N, counts_J, weights, inputs, TOKENS + 1, HIDDEN)

    exact, allowed = torch.zeros(2, TOKENS + 1, HIDDEN, dtype=torch.float64)
    part = slice(inputs * HIDDEN, (inputs + 1) * HIDDEN)
    copies = iter(h_NR.double())
    for job in jobs:
        for token in job.tokens:
            h_R = next(copies)
            exact[token] += h_R @ job.exact[:, part]
            allowed[token] += h_R.abs() @ job.magnitude[:, part]
    assert found.dtype == torch.float32
    assert_close(found, exact, rounding(dtype) * allowed)
    assert torch.equal(found[-1], torch.zeros(HIDDEN))


@every_codec
def test_weights_have_the_rows_of_what_they_are_made_of(codec):
    expert = make_expert(codec, torch.float32, centered=True)

    for weights in (
        Weights(expert.center, expert.residual),
        Weights(expert.center, None),
        Weights(None, expert.residual),
    ):
        assert weights.rows == ROWS
