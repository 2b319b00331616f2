"""Low-rank factors: the same bytes for any number of threads, and close to exact if randomised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from resmoe_dist.codecs.svd import EXACT_SVD_LIMIT, low_rank_factors

# With more rows and columns than this, the matrices of these tests are decomposed randomly.
RANDOMISED = 8


@pytest.fixture
def set_threads():
    """A function that sets PyTorch's number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Most of these differ if LAPACK runs on as many threads, or products are not cut into blocks.
@pytest.mark.parametrize("limit", [RANDOMISED, EXACT_SVD_LIMIT], ids=["randomised", "exact"])
@pytest.mark.parametrize(("rows", "columns"), [(500, 3500), (3500, 500), (20, 6144), (300, 290)])
def test_bytes_do_not_depend_on_the_number_of_threads(set_threads, limit, rows, columns):
    matrix = torch.randn(rows, columns)
    rank = int(0.25 * rows * columns / (rows + columns))
    factors = []
    for count in (1, 2, 3, 4):
        set_threads(count)
        factors.append(low_rank_factors(matrix, rank, limit))
        assert torch.get_num_threads() == count

    for left, right in factors[1:]:
        assert torch.equal(factors[0][0], left)
        assert torch.equal(factors[0][1], right)


def test_number_of_threads_is_restored_after_a_failure(set_threads):
    set_threads(3)
    with pytest.raises(torch.linalg.LinAlgError):
        low_rank_factors(torch.full((9, 14), torch.nan), 2)

    assert torch.get_num_threads() == 3


@pytest.fixture
def large_matrix() -> Tensor:
    """A matrix with slowly falling singular values, the hardest case of a randomised method."""
    return torch.randn(120, 150)


def test_randomised_factors_come_close_to_the_exact_ones(large_matrix):
    left, right = low_rank_factors(large_matrix, 20, RANDOMISED)

    values = np.linalg.svd(large_matrix.double().numpy(), compute_uv=False)
    tail = float(np.sum(values[20:] ** 2))
    error = float((large_matrix.double() - left.double() @ right.double()).square().sum())
    # Above the exact error by more than rounding: the randomised method did run.
    assert tail * (1 + 1e-5) < error < tail * 1.01


def test_randomised_factors_are_the_same_each_time(large_matrix):
    first, second = (low_rank_factors(large_matrix, 20, RANDOMISED) for _ in range(2))

    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_randomised_factors_leave_the_global_random_state_alone(large_matrix):
    before = torch.random.get_rng_state()

    low_rank_factors(large_matrix, 20, RANDOMISED)

    assert torch.equal(torch.random.get_rng_state(), before)
