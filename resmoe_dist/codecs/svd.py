"""Factors of the nearest low-rank matrix, the same bytes for any number of threads.

LAPACK's results depend on the number of threads, and so do MKL's matrix products at some sizes.
So each of them runs on one thread. A large product is cut into blocks of fixed size, which the
threads share.

Legend: I rows, D columns, r rank, q columns of a sketch; M, N rows and columns of any matrix, K the
dimension that a product sums over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

# Up to this many rows or columns, exact singular vectors take seconds. Above it, randomised ones
# (Halko, Martinsson and Tropp 2011) with power iterations and oversampling.
EXACT_SVD_LIMIT = 2048
_POWER_ITERATIONS = 4
_OVERSAMPLING = 16
_BLOCK = 256
_TINY = torch.finfo(torch.float32).tiny

# product(A, B) is A @ B.
Product = Callable[[Tensor, Tensor], Tensor]


def low_rank_factors(
    matrix_ID: Tensor, rank: int, exact_limit: int = EXACT_SVD_LIMIT
) -> tuple[Tensor, Tensor]:
    """left [I, r] and right [r, D], whose product is the nearest matrix of that rank.

    The singular values are shared: their square roots scale both factors. At full rank one factor
    is the identity and the other a copy of the matrix. exact_limit: with more rows and columns than
    this, the singular vectors are randomised.
    """
    rows, columns = matrix_ID.shape
    if rows > columns:
        left_Dr, right_rI = low_rank_factors(matrix_ID.T, rank, exact_limit)
        return right_rI.T, left_Dr.T
    if rank == rows:
        return torch.eye(rows, device=matrix_ID.device), matrix_ID.clone()
    with _thread_independent() as product:
        if rows <= exact_limit:
            left_Ir, right_rD = _leading(matrix_ID, rank, product)
        else:
            basis_Iq = _range_of(matrix_ID, min(rank + _OVERSAMPLING, rows), product)
            sketch_qD = product(basis_Iq.T, matrix_ID)
            left_qr, right_rD = _leading(sketch_qD, rank, product)
            left_Ir = product(basis_Iq, left_qr)
        # In float64: squares of float32 values can overflow or underflow.
        root_r = right_rD.double().norm(dim=1).sqrt().float()
    return left_Ir * root_r, right_rD / root_r.clamp_min(_TINY).unsqueeze(1)


def _leading(matrix_MN: Tensor, rank: int, product: Product) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors U [M, r], and Uᵀ · matrix [r, N]."""
    wide_MN = matrix_MN.double()
    # Eigenvalues are squared singular values. float64 resolves them better than float32 would
    # resolve the singular values themselves.
    gram_MM = product(wide_MN, wide_MN.T)
    _, vectors_MM = torch.linalg.eigh(gram_MM)
    left_Mr = vectors_MM[:, -rank:].flip(1).float()
    return left_Mr, product(left_Mr.T, matrix_MN)


def _range_of(matrix_ID: Tensor, width: int, product: Product) -> Tensor:
    """An orthonormal basis [I, q] that nearly spans the leading singular vectors."""
    # A generator with a fixed seed: same input, same bytes; the global random state is untouched.
    generator = torch.Generator().manual_seed(0)
    start_Dq = torch.randn(matrix_ID.shape[1], width, generator=generator)
    basis_Iq = torch.linalg.qr(product(matrix_ID, start_Dq.to(matrix_ID.device))).Q
    for _ in range(_POWER_ITERATIONS):
        basis_Dq = torch.linalg.qr(product(matrix_ID.T, basis_Iq)).Q
        basis_Iq = torch.linalg.qr(product(matrix_ID, basis_Dq)).Q
    return basis_Iq


@contextmanager
def _thread_independent() -> Iterator[Product]:
    """Limit PyTorch to one thread; yield a product that uses as many threads as it had before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:

            def product(left_MK: Tensor, right_KN: Tensor) -> Tensor:
                if left_MK.shape[0] < right_KN.shape[1]:
                    return product(right_KN.T, left_MK.T).T
                blocks = pool.map(lambda rows: rows @ right_KN, left_MK.split(_BLOCK))
                return torch.cat(list(blocks))

            yield product
    finally:
        torch.set_num_threads(threads)
