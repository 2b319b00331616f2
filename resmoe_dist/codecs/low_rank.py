"""`low_rank`: the residual of the design matrix by its leading singular vectors.

Paper 001, appendix A.4 (SVD on the concatenated matrix). One factor has a row per neuron and is
sharded with them; the other is shared by all rows, so every TP rank holds it whole.

What is stored does not depend on how many threads there are. LAPACK's results do, and MKL's matrix
products do for some sizes, so each runs on one thread; a product is cut into blocks of fixed size,
which the threads share.

Legend: I rows, R rows held here, D columns, r rank, q columns of a sketch; M, N rows and columns of
any matrix, K what a product sums over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from resmoe_dist.codecs.base import EncodedResidual, TensorReader

# Up to this many rows or columns the exact singular vectors take seconds; past it, randomised ones
# (Halko, Martinsson and Tropp 2011) with power iterations and oversampling.
_EXACT_SVD_LIMIT = 2048
_POWER_ITERATIONS = 4
_OVERSAMPLING = 16
_BLOCK = 256
_TINY = torch.finfo(torch.float32).tiny

# product(A, B) is A @ B.
Product = Callable[[Tensor, Tensor], Tensor]


def rank_for(rows: int, columns: int, keep: float) -> int:
    """The rank whose two factors hold `keep` of the entries: keep·I·D / (I + D), at least 1.

    Never above min(I, D), where the factorisation is exact.
    """
    rank = int(keep * rows * columns / (rows + columns))
    return min(max(rank, 1), rows, columns)


class LowRankResidual(EncodedResidual):
    """left [R, r] · right [r, D]."""

    name = "low_rank"

    left: Tensor
    right: Tensor

    @classmethod
    def encode(
        cls, residual_ID: Tensor, *, keep: float, dtype: torch.dtype, mask_ID: Tensor | None = None
    ) -> LowRankResidual:
        rows, columns = residual_ID.shape
        # keep = 1 asks for the residual itself, which I·D/(I+D) singular vectors do not give.
        rank = min(rows, columns) if keep >= 1 else rank_for(rows, columns, keep)
        left_Ir, right_rD = _factors(residual_ID.float(), rank)
        left, right = left_Ir.to(dtype).contiguous(), right_rD.to(dtype).contiguous()
        return cls(columns, {"left": left, "right": right})

    @classmethod
    def read(cls, read: TensorReader, columns: int, start: int, stop: int) -> LowRankResidual:
        left, right = read("left", start, stop), read("right", 0, None)
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"factors of rank {left.shape[1]} and {right.shape[0]}")
        return cls(columns, {"left": left, "right": right})

    @classmethod
    def expected_tensors(cls, rows: int, columns: int) -> dict[str, tuple[int | None, ...]]:
        return {"left": (rows, None), "right": (None, columns)}

    @classmethod
    def stored_bytes(cls, rows: int, columns: int, keep: float, itemsize: int) -> int:
        rank = min(rows, columns) if keep >= 1 else rank_for(rows, columns, keep)
        return rank * (rows + columns) * itemsize

    @property
    def rows(self) -> int:
        return self.left.shape[0]

    def decode(self) -> Tensor:
        return self.left @ self.right

    def add_to(self, dense_RD: Tensor) -> None:
        dense_RD.addmm_(self.left, self.right)

    def restore(
        self, center_RD: Tensor | None, out: Tensor, first_row: int = 0, first_column: int = 0
    ) -> None:
        rows = slice(first_row, first_row + out.shape[0])
        columns = slice(first_column, first_column + out.shape[1])
        left_Rr, right_rD = self.left[rows], self.right[:, columns]
        if center_RD is None:
            torch.mm(left_Rr, right_rD, out=out)
        else:
            torch.addmm(center_RD[rows, columns], left_Rr, right_rD, out=out)

    def multiply(self, x_TH: Tensor, first_column: int) -> Tensor:
        right_rH = self.right[:, first_column : first_column + x_TH.shape[1]]
        return (x_TH @ right_rH.T) @ self.left.T

    def multiply_back(self, h_TR: Tensor, first_column: int, hidden: int) -> Tensor:
        return (h_TR @ self.left) @ self.right[:, first_column : first_column + hidden]

    def slice_rows(self, start: int, stop: int) -> LowRankResidual:
        return LowRankResidual(self.columns, {"left": self.left[start:stop], "right": self.right})


def _factors(matrix_ID: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left [I, r] and right [r, D] of the nearest product, each with the singular values' roots.

    A product of the matrix's own rank is the matrix: then one of the two is the identity.
    """
    rows, columns = matrix_ID.shape
    if rows > columns:
        left_Dr, right_rI = _factors(matrix_ID.T, rank)
        return right_rI.T, left_Dr.T
    if rank == rows:
        # A copy, as the caller may go on to change the residual.
        return torch.eye(rows, device=matrix_ID.device), matrix_ID.clone()
    with _thread_independent() as product:
        if rows <= _EXACT_SVD_LIMIT:
            left_Ir, right_rD = _leading(matrix_ID, rank, product)
        else:
            basis_Iq = _range_of(matrix_ID, min(rank + _OVERSAMPLING, rows), product)
            sketch_qD = product(basis_Iq.T, matrix_ID)
            left_qr, right_rD = _leading(sketch_qD, rank, product)
            left_Ir = product(basis_Iq, left_qr)
        # In float64, where squares neither overflow nor vanish.
        root_r = right_rD.double().norm(dim=1).sqrt().float()
    return left_Ir * root_r, right_rD / root_r.clamp_min(_TINY).unsqueeze(1)


def _leading(matrix_MN: Tensor, rank: int, product: Product) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors U [M, r], and Uᵀ · matrix [r, N]."""
    wide_MN = matrix_MN.double()
    # Squared singular values in float64 tell more of them apart than float32 tells of the others.
    gram_MM = product(wide_MN, wide_MN.T)
    _, vectors_MM = torch.linalg.eigh(gram_MM)
    left_Mr = vectors_MM[:, -rank:].flip(1).float()
    return left_Mr, product(left_Mr.T, matrix_MN)


def _range_of(matrix_ID: Tensor, width: int, product: Product) -> Tensor:
    """An orthonormal basis [I, q] of nearly all that the leading singular vectors span."""
    # The caller's random state is left alone, and the same input gives the same bytes.
    generator = torch.Generator().manual_seed(0)
    start_Dq = torch.randn(matrix_ID.shape[1], width, generator=generator)
    basis_Iq = torch.linalg.qr(product(matrix_ID, start_Dq.to(matrix_ID.device))).Q
    for _ in range(_POWER_ITERATIONS):
        basis_Dq = torch.linalg.qr(product(matrix_ID.T, basis_Iq)).Q
        basis_Iq = torch.linalg.qr(product(matrix_ID, basis_Dq)).Q
    return basis_Iq


@contextmanager
def _thread_independent() -> Iterator[Product]:
    """Within the block PyTorch runs on one thread; the product given uses as many as it had."""
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
