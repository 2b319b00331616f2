"""`low_rank` against NumPy's singular values: the tail is the least error any rank r can have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resmoe_dist.codecs import LowRankResidual, low_rank
from resmoe_dist.codecs.low_rank import rank_for


def _tail(matrix: torch.Tensor, rank: int) -> float:
    """Σ of the squared singular values past the first `rank`."""
    return float(np.sum(np.linalg.svd(matrix.double().numpy(), compute_uv=False)[rank:] ** 2))


def _squared_error(matrix: torch.Tensor, encoded: LowRankResidual) -> float:
    return float(np.sum((matrix.double().numpy() - encoded.decode().double().numpy()) ** 2))


@given(
    rows=st.integers(1, 23),
    columns=st.integers(1, 37),
    keep=st.sampled_from([0.0, 0.1, 0.25, 0.6, 0.99]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_the_error_is_the_tail_of_the_singular_values(rows, columns, keep, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))

    encoded = LowRankResidual.encode(matrix, keep=keep, dtype=torch.float32)

    tail = _tail(matrix, encoded.left.shape[1])
    rounding = 1e-10 * float(matrix.square().sum())
    assert _squared_error(matrix, encoded) == pytest.approx(tail, rel=1e-4, abs=rounding)


@given(rows=st.integers(1, 60), columns=st.integers(1, 60), keep=st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_the_rank_is_the_largest_whose_factors_hold_the_share(rows, columns, keep):
    fitting = [r for r in range(1, 61) if r * (rows + columns) <= keep * rows * columns]

    # One singular vector is stored even where none fits.
    assert rank_for(rows, columns, keep) == max(fitting, default=1)


def test_the_rank_is_never_above_that_of_the_matrix():
    assert [rank_for(3, 50, keep) for keep in (0.9, 1.0, 5.0)] == [2, 2, 3]


@pytest.mark.parametrize(("rows", "columns"), [(9, 14), (14, 9), (1, 6), (6, 1), (8, 8)])
def test_keeping_everything_restores_the_matrix(rows, columns):
    matrix = torch.randn(rows, columns)

    encoded = LowRankResidual.encode(matrix, keep=1.0, dtype=torch.float32)

    torch.testing.assert_close(encoded.decode(), matrix, rtol=0, atol=1e-5)


def test_a_matrix_of_that_rank_is_restored():
    matrix = torch.randn(20, 3) @ torch.randn(3, 30)  # 150 of 600 entries

    encoded = LowRankResidual.encode(matrix, keep=0.25, dtype=torch.float32)

    assert encoded.left.shape == (20, 3)
    torch.testing.assert_close(encoded.decode(), matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_the_scale_of_the_residual_does_not_matter(scale):
    matrix = torch.randn(12, 17)

    encoded = LowRankResidual.encode(matrix * scale, keep=0.5, dtype=torch.float32)

    expected = LowRankResidual.encode(matrix, keep=0.5, dtype=torch.float32).decode()
    torch.testing.assert_close(encoded.decode() / scale, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_two_factors(dtype):
    encoded = LowRankResidual.encode(torch.randn(11, 19), keep=0.4, dtype=dtype)

    # 0.4 · 209 / 30 = 2.8: two vectors on each side.
    assert encoded.nbytes == (2 * 11 + 2 * 19) * (4 if dtype is torch.float32 else 2)


def test_factors_in_bfloat16_are_within_its_rounding_of_the_exact_ones():
    matrix = torch.randn(30, 40)

    exact = LowRankResidual.encode(matrix, keep=0.5, dtype=torch.float32)
    rounded = LowRankResidual.encode(matrix, keep=0.5, dtype=torch.bfloat16)

    assert rounded.left.dtype == rounded.right.dtype == torch.bfloat16
    # Two factors and their product, each rounded to 8 bits.
    bound = (exact.left.abs() @ exact.right.abs()) * 3 * 2**-8
    assert bool(((rounded.decode().float() - exact.decode()).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(9, 14), (14, 9)])
def test_keeping_everything_takes_no_rounding(rows, columns, dtype):
    matrix = torch.randn(rows, columns).to(dtype)

    encoded = LowRankResidual.encode(matrix, keep=1.0, dtype=dtype)

    assert torch.equal(encoded.decode(), matrix)


def test_a_residual_of_nothing_is_restored():
    encoded = LowRankResidual.encode(torch.zeros(12, 17), keep=0.5, dtype=torch.float32)

    assert torch.equal(encoded.decode(), torch.zeros(12, 17))


@pytest.fixture
def threads():
    """threads(n): PyTorch on n threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# With LAPACK on as many threads, or products that are not cut up, most of these differ.
@pytest.mark.parametrize("limit", [8, 2048], ids=["randomised", "exact"])
@pytest.mark.parametrize(("rows", "columns"), [(500, 3500), (3500, 500), (20, 6144), (300, 290)])
def test_the_bytes_do_not_depend_on_the_number_of_threads(
    monkeypatch, threads, limit, rows, columns
):
    monkeypatch.setattr(low_rank, "_EXACT_SVD_LIMIT", limit)
    matrix = torch.randn(rows, columns)
    encoded = []
    for count in (1, 2, 3, 4):
        threads(count)
        encoded.append(LowRankResidual.encode(matrix, keep=0.25, dtype=torch.float32))
        assert torch.get_num_threads() == count

    for other in encoded[1:]:
        assert torch.equal(encoded[0].left, other.left)
        assert torch.equal(encoded[0].right, other.right)


def test_the_number_of_threads_is_what_it_was_after_a_failure(threads):
    threads(3)
    with pytest.raises(torch.linalg.LinAlgError):
        LowRankResidual.encode(torch.full((9, 14), torch.nan), keep=0.5, dtype=torch.float32)

    assert torch.get_num_threads() == 3


@pytest.fixture
def past_the_exact_limit(monkeypatch):
    """A matrix that takes the way of large ones, with the slow spectrum that is hardest there."""
    monkeypatch.setattr(low_rank, "_EXACT_SVD_LIMIT", 8)
    return torch.randn(120, 150)


def test_the_randomised_decomposition_comes_close_to_the_tail(past_the_exact_limit):
    encoded = LowRankResidual.encode(past_the_exact_limit, keep=0.3, dtype=torch.float32)

    tail = _tail(past_the_exact_limit, encoded.left.shape[1])
    # Above it by more than rounding: it is the randomised one that ran.
    assert tail * (1 + 1e-5) < _squared_error(past_the_exact_limit, encoded) < tail * 1.01


def test_the_randomised_decomposition_gives_the_same_bytes_again(past_the_exact_limit):
    first, second = (
        LowRankResidual.encode(past_the_exact_limit, keep=0.3, dtype=torch.float32)
        for _ in range(2)
    )

    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


def test_the_randomised_decomposition_leaves_the_random_state_alone(past_the_exact_limit):
    before = torch.random.get_rng_state()

    LowRankResidual.encode(past_the_exact_limit, keep=0.3, dtype=torch.float32)

    assert torch.equal(torch.random.get_rng_state(), before)


def test_factors_of_different_rank_are_refused():
    encoded = LowRankResidual.encode(torch.randn(9, 14), keep=0.6, dtype=torch.float32)
    tensors = encoded.tensors() | {"right": encoded.right[:-1]}

    with pytest.raises(ValueError, match="rank 3 and 2"):
        LowRankResidual.read(lambda name, start, stop: tensors[name][start:stop], 14, 0, 9)
