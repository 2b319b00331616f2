"""Problems for the kernels, of all shapes, and what is exact about them: float64 sums in NumPy.

Legend: T tokens, N copies, S rows, H hidden, D columns, J jobs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.kernels.rows import CompressedRows

# Best first.
INSTRUCTION_SETS = ["avx512_bf16", "avx512", "avx2", "portable"]

# Of a sum, relative to the sum of its terms' magnitudes: sixteen roundings of float32. In the worst
# case n terms take n roundings, but those of n terms go up and down, and like √n they add up.
ROUNDING = 16 * 2.0**-24


@dataclass(frozen=True)
class Part:
    """What a job's rows consist of, and the copies that are multiplied by them.

    share: of entries kept, None for no residual. empty: share of rows with none. before, after:
    rows of the expert around these. gap: columns that a row of the centre lies further from the
    next. copies, repeated: so many of the tokens, in order, or any, again and again.
    """

    center: bool = True
    share: float | None = 0.25
    empty: float = 0.0
    before: int = 0
    after: int = 0
    gap: int = 0
    wide_offsets: bool = False
    copies: int = 1
    repeated: bool = False


@dataclass(frozen=True)
class Case:
    """Sizes, and what is random: `build` makes the tensors.

    one_center: the parts that have a centre have the same one.
    """

    rows: int
    hidden: int
    inputs: int = 2
    extra: int = 0
    tokens: int = 1
    parts: tuple[Part, ...] = (Part(),)
    one_center: bool = False
    seed: int = 0

    @property
    def columns(self) -> int:
        """D."""
        return (self.inputs + 1) * self.hidden + self.extra

    def build(self, dtype: torch.dtype) -> Problem:
        """Standard normal tensors."""
        rng = np.random.default_rng(self.seed)
        token_N, counts_J = [], []
        for part in self.parts:
            copies = part.copies if self.tokens else 0
            if part.repeated:
                token_N.append(rng.integers(0, max(1, self.tokens), copies))
            else:
                copies = min(copies, self.tokens)
                token_N.append(np.sort(rng.permutation(self.tokens)[:copies]))
            counts_J.append(copies)
        jobs = [self.make_rows(part, dtype, rng) for part in self.parts]
        centers = [job.center for job in jobs if job.center is not None]
        if self.one_center and centers:
            one = centers[0]
            jobs = [job if job.center is None else replace(job, center=one) for job in jobs]
        return Problem(
            jobs=jobs,
            counts_J=counts_J,
            token_N=torch.from_numpy(np.concatenate([[], *token_N]).astype(np.int64)),
            x_TH=normal(rng, self.tokens, self.hidden).to(dtype),
            h_NS=normal(rng, sum(counts_J), self.rows).to(dtype),
            inputs=self.inputs,
        )

    def make_rows(self, part: Part, dtype: torch.dtype, rng: np.random.Generator) -> CompressedRows:
        """Rows from the middle of an expert, with its values in one tensor."""
        these = slice(part.before, part.before + self.rows)
        total = part.before + self.rows + part.after
        tensors = {}
        if part.center:
            wide = normal(rng, total, self.columns + part.gap).to(dtype)
            tensors["center"] = wide[these, part.gap // 2 :][:, : self.columns]
        if part.share is not None:
            mask = rng.random((total, self.columns)) < part.share
            mask[rng.random(total) < part.empty] = False
            offsets = np.concatenate([[0], mask.sum(1).cumsum()])
            offsets = torch.from_numpy(offsets.astype("i8" if part.wide_offsets else "i4"))
            tensors["bitmap"] = packed(mask)[these]
            tensors["values"] = normal(rng, int(mask.sum())).to(dtype)
            tensors["row_offsets"] = offsets[these.start : these.stop + 1]
        return CompressedRows(**tensors)


class Problem(NamedTuple):
    """What the operations take, and calls with it."""

    jobs: list[CompressedRows]
    counts_J: list[int]
    token_N: Tensor
    x_TH: Tensor
    h_NS: Tensor
    inputs: int

    def project_in(self, operations) -> Tensor:
        return operations.project_in(self.x_TH, self.token_N, self.counts_J, self.jobs, self.inputs)

    def project_out(self, operations) -> Tensor:
        tokens, hidden = self.x_TH.shape
        return operations.project_out(
            self.h_NS, self.token_N, self.counts_J, self.jobs, self.inputs, tokens, hidden
        )


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def packed(mask: np.ndarray) -> Tensor:
    return torch.from_numpy(np.packbits(mask, axis=1, bitorder="little"))


PARTS = st.builds(
    Part,
    center=st.just(True),
    share=st.sampled_from([None, 0.0, 0.02, 0.25, 0.6, 1.0]),
    empty=st.sampled_from([0.0, 0.3]),
    before=st.integers(0, 4),
    after=st.sampled_from([0, 2]),
    gap=st.sampled_from([0, 1, 37]),
    wide_offsets=st.booleans(),
    # Around what is taken at a time.
    copies=st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 20, 33]),
    repeated=st.booleans(),
)
RESIDUALS = st.builds(
    Part,
    center=st.just(False),
    share=st.sampled_from([0.0, 0.02, 0.25, 0.6, 1.0]),
    before=st.integers(0, 4),
    after=st.sampled_from([0, 2]),
    wide_offsets=st.booleans(),
    copies=st.integers(0, 20),
    repeated=st.booleans(),
)
CASES = st.builds(
    Case,
    rows=st.integers(1, 40),
    # Columns are padded to 128.
    hidden=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 512, 515, 700])),
    inputs=st.sampled_from([1, 2]),
    extra=st.integers(0, 3),
    tokens=st.integers(0, 35),
    parts=st.lists(st.one_of(PARTS, RESIDUALS), max_size=4).map(tuple),
    one_center=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


def dense(rows: CompressedRows, columns: int) -> np.ndarray:
    """Rows in NumPy's float64, the sum rounded once to their dtype."""
    total = np.zeros((rows.count, columns))
    if rows.center is not None:
        total += rows.center.double().numpy()
    if rows.bitmap is not None:
        kept = np.unpackbits(rows.bitmap.numpy(), axis=1, bitorder="little")[:, :columns] == 1
        values, offsets = rows.values.double().numpy(), rows.row_offsets.tolist()
        for i in range(rows.count):
            total[i, kept[i]] += values[offsets[i] : offsets[i + 1]]
    # float32 is exact enough on the way that nothing is rounded twice.
    return torch.from_numpy(total).float().to(rows.dtype).double().numpy()


class Sums(NamedTuple):
    """Products in float64, and the sums of their terms' magnitudes."""

    exact: np.ndarray
    magnitude: np.ndarray


def copies_of(problem: Problem) -> Iterator[tuple[slice, np.ndarray, CompressedRows]]:
    """For each job: its copies, their tokens, its rows."""
    end = 0
    for rows, count in zip(problem.jobs, problem.counts_J, strict=True):
        begin, end = end, end + count
        yield slice(begin, end), problem.token_N[begin:end].numpy(), rows


def sums_in(case: Case, problem: Problem) -> Sums:
    x_TH = problem.x_TH.double().numpy()
    S = problem.jobs[0].count if problem.jobs else 0
    sums = Sums(*np.zeros((2, len(problem.token_N), case.inputs * S)))
    for copies, token_n, rows in copies_of(problem):
        weights_SD = dense(rows, case.columns)
        for i in range(case.inputs):
            W = weights_SD[:, i * case.hidden : (i + 1) * case.hidden]
            columns = slice(i * S, (i + 1) * S)
            sums.exact[copies, columns] = x_TH[token_n] @ W.T
            sums.magnitude[copies, columns] = abs(x_TH[token_n]) @ abs(W).T
    return sums


def sums_out(case: Case, problem: Problem) -> Sums:
    h_NS = problem.h_NS.double().numpy()
    sums = Sums(*np.zeros((2, case.tokens, case.hidden)))
    first = case.inputs * case.hidden
    for copies, token_n, rows in copies_of(problem):
        W = dense(rows, case.columns)[:, first : first + case.hidden]
        for h_S, t in zip(h_NS[copies], token_n, strict=True):
            sums.exact[t] += h_S @ W
            sums.magnitude[t] += abs(h_S) @ abs(W)
    return sums


def assert_sums(found: Tensor, sums: Sums) -> None:
    """Float32 sums, in any order, of the terms that `sums` are of.

    An error is held against the magnitudes of the terms: against the result it may be of any size,
    where terms cancel. The products of bfloat16 numbers are exact in float32, so that the bound is
    the same for both dtypes: nothing but the additions is rounded.
    """
    assert found.dtype == torch.float32
    assert found.shape == sums.exact.shape
    error = abs(found.double().numpy() - sums.exact)
    assert (error <= ROUNDING * sums.magnitude).all(), (error / sums.magnitude).max()


def assert_equal_numbers(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    wrong = (found != expected) & ~(found.isnan() & expected.isnan())
    assert not wrong.any(), (found[wrong][:5], expected[wrong][:5])


def restored(operations, rows: CompressedRows, columns: int, first_column: int = 0) -> Tensor:
    out = torch.full((rows.count, columns), 99.0, dtype=rows.dtype)
    operations.restore(rows, out, first_column)
    return out


def columns_of(case: Case, data: st.DataObject) -> tuple[int, int]:
    """Any range of columns, as a first one and how many."""
    first = data.draw(st.integers(0, case.columns), "first column")
    return first, data.draw(st.integers(0, case.columns - first), "columns")
