"""`low_rank` against NumPy's singular values: its error is the least possible at its rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from resmoe_dist.codecs import LowRankConfig, LowRankMatrix


def _encode(
    matrix: torch.Tensor, dtype: torch.dtype = torch.float32, **options: float
) -> LowRankMatrix:
    return LowRankMatrix.encode(matrix, LowRankConfig(**options), dtype)


def _tail(matrix: torch.Tensor, rank: int) -> float:
    """Σ of the squared singular values past the first `rank`."""
    return float(np.sum(np.linalg.svd(matrix.double().numpy(), compute_uv=False)[rank:] ** 2))


def _squared_error(matrix: torch.Tensor, encoded: LowRankMatrix) -> float:
    return float(np.sum((matrix.double().numpy() - encoded.decode().double().numpy()) ** 2))


@given(
    rows=st.integers(1, 23),
    columns=st.integers(1, 37),
    keep=st.sampled_from([0.0, 0.1, 0.25, 0.6, 0.99]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_error_is_the_tail_of_the_singular_values(rows, columns, keep, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))

    encoded = _encode(matrix, keep=keep)

    tail = _tail(matrix, encoded.left.shape[1])
    rounding = 1e-10 * float(matrix.square().sum())
    assert _squared_error(matrix, encoded) == pytest.approx(tail, rel=1e-4, abs=rounding)


@given(rows=st.integers(1, 60), columns=st.integers(1, 60), keep=st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_rank_is_the_largest_whose_factors_hold_the_share(rows, columns, keep):
    fitting = [r for r in range(1, 61) if r * (rows + columns) <= keep * rows * columns]

    # One singular vector is stored even if none fits.
    assert LowRankConfig(keep=keep).rank_of(rows, columns) == max(fitting, default=1)


def test_rank_is_never_above_that_of_the_matrix():
    assert [LowRankConfig(keep=keep).rank_of(3, 50) for keep in (0.9, 1.0)] == [2, 3]
    assert [LowRankConfig(rank=rank).rank_of(3, 50) for rank in (1, 3, 7)] == [1, 3, 3]


def test_rank_replaces_the_budget():
    encoded = _encode(torch.randn(20, 30), rank=4, keep=0.9)

    assert (encoded.left.shape, encoded.right.shape) == ((20, 4), (4, 30))


@pytest.mark.parametrize("options", [{"keep": -0.1}, {"keep": 1.1}, {"rank": 0}, {"ranks": 3}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValidationError):
        LowRankConfig(**options)


@pytest.mark.parametrize(("rows", "columns"), [(9, 14), (14, 9), (1, 6), (6, 1), (8, 8)])
def test_keeping_everything_restores_the_matrix(rows, columns):
    matrix = torch.randn(rows, columns)

    encoded = _encode(matrix, keep=1.0)

    torch.testing.assert_close(encoded.decode(), matrix, rtol=0, atol=1e-5)


def test_matrix_of_the_stored_rank_is_restored():
    matrix = torch.randn(20, 3) @ torch.randn(3, 30)  # 150 of 600 entries

    encoded = _encode(matrix, keep=0.25)

    assert encoded.left.shape == (20, 3)
    torch.testing.assert_close(encoded.decode(), matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale_of_the_matrix_does_not_matter(scale):
    matrix = torch.randn(12, 17)

    encoded = _encode(matrix * scale, keep=0.5)

    expected = _encode(matrix, keep=0.5).decode()
    torch.testing.assert_close(encoded.decode() / scale, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_two_factors(dtype):
    encoded = _encode(torch.randn(11, 19), dtype, keep=0.4)

    # 0.4 · 209 / 30 = 2.8: two vectors on each side.
    assert encoded.nbytes == (2 * 11 + 2 * 19) * (4 if dtype is torch.float32 else 2)


def test_factors_in_bfloat16_are_within_its_rounding_of_the_exact_ones():
    matrix = torch.randn(30, 40)

    exact = _encode(matrix, keep=0.5)
    rounded = _encode(matrix, torch.bfloat16, keep=0.5)

    assert rounded.left.dtype == rounded.right.dtype == torch.bfloat16
    # Two factors and their product, each rounded to 8 bits.
    bound = (exact.left.abs() @ exact.right.abs()) * 3 * 2**-8
    assert bool(((rounded.decode().float() - exact.decode()).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(9, 14), (14, 9)])
def test_keeping_everything_does_not_round(rows, columns, dtype):
    matrix = torch.randn(rows, columns).to(dtype)

    encoded = _encode(matrix, dtype, keep=1.0)

    assert torch.equal(encoded.decode(), matrix)


def test_zero_matrix_is_restored():
    encoded = _encode(torch.zeros(12, 17), keep=0.5)

    assert torch.equal(encoded.decode(), torch.zeros(12, 17))


def test_factors_of_different_rank_are_refused():
    encoded = _encode(torch.randn(9, 14), keep=0.6)
    tensors = encoded.tensors() | {"right": encoded.right[:-1]}

    def read(name: str, start: int, stop: int | None) -> torch.Tensor:
        return tensors[name][start:stop]

    with pytest.raises(ValueError, match="rank 3 and 2"):
        LowRankMatrix.read(read, 14, 0, 9, torch.float32)
