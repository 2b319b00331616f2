"""Random layers with routed copies, and the exact results in NumPy's float64.

Legend: T tokens, N routed copies, S rows, H hidden, D columns, L experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.codecs import DenseMatrix, EncodedMatrix, PrunedMatrix
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.kernels import LayerWeights
from resmoe_dist.kernels.half_products import HalfProductBackend
from resmoe_dist.kernels.reference import FUSED_ACTIVATIONS
from resmoe_dist.routing import RoutedTokens

# Fastest first.
INSTRUCTION_SETS = ["amx", "avx512_bf16", "avx512", "avx2", "portable"]
# Those whose bfloat16 instructions treat denormal numbers as zeros.
FLUSHING_SETS = ("amx", "avx512_bf16")

# Error of a float32 sum, relative to the sum of its terms' magnitudes: sixteen roundings. n terms
# are rounded n times in the worst case, but rounding errors are random and grow like √n.
ROUNDING = 16 * 2.0**-24


class PlainActivation:
    """An activation by the name that fused kernels know. fused=False hides the name from them."""

    def __init__(self, name: str = "silu", *, fused: bool = True) -> None:
        self.name = name
        self.function = FUSED_ACTIVATIONS[name]
        self.kernel = name if fused else None

    def __call__(self, *inputs: Tensor) -> Tensor:
        h = self.function(inputs[0])
        return h if len(inputs) == 1 else h * inputs[1]


@dataclass(frozen=True)
class Expert:
    """One expert of a random layer, and the copies that are routed to it.

    center: number of its centre, None for no centre. share: of residual entries kept. empty: share
    of rows without entries. copies, repeated: this many of the tokens in order, or random tokens
    with repetition.
    """

    center: int | None = 0
    share: float = 0.25
    empty: float = 0.0
    wide_offsets: bool = False
    copies: int = 1
    repeated: bool = False


@dataclass(frozen=True)
class Case:
    """Sizes of a random layer; `build` draws the tensors.

    rows: of the experts. first_row, last_rows: rows before and after those that are used. extra:
    columns after the output columns. gap: extra distance between the rows of a centre in memory.
    unused_centers: centres that no expert has.
    """

    rows: int
    hidden: int
    inputs: int = 2
    extra: int = 0
    tokens: int = 1
    experts: tuple[Expert, ...] = (Expert(),)
    first_row: int = 0
    last_rows: int = 0
    gap: int = 0
    unused_centers: int = 0
    seed: int = 0

    @property
    def columns(self) -> int:
        """D."""
        return (self.inputs + 1) * self.hidden + self.extra

    def build(self, dtype: torch.dtype, activation: str = "silu", fused: bool = True) -> Problem:
        """Standard normal tensors."""
        rng = np.random.default_rng(self.seed)
        token_N, counts = [], []
        for expert in self.experts:
            copies = expert.copies if self.tokens else 0
            if expert.repeated:
                token_N.append(rng.integers(0, max(1, self.tokens), copies))
            else:
                copies = min(copies, self.tokens)
                token_N.append(np.sort(rng.permutation(self.tokens)[:copies]))
            counts.append(copies)
        residuals = [self._residual(expert, dtype, rng) for expert in self.experts]
        numbers = [-1 if expert.center is None else expert.center for expert in self.experts]
        centers = [self._center(dtype, rng) for _ in range(max(numbers) + 1 + self.unused_centers)]
        shape = _Shape(self.all_rows, self.hidden, gated=self.inputs == 2, extra=self.extra)
        routed = RoutedTokens(
            x_RH=normal(rng, self.tokens, self.hidden).to(dtype),
            token_N=torch.from_numpy(np.concatenate(token_N).astype(np.int64)),
            weight_N=normal(rng, sum(counts)),
            offsets_L=torch.tensor([0, *np.cumsum(counts)]),
        )
        layer = LayerWeights(
            shape,
            tuple(residuals),
            tuple(centers),
            tuple(numbers),
            PlainActivation(activation, fused=fused),
        )
        h_NS = normal(rng, sum(counts), self.rows).to(dtype)
        rows = slice(self.first_row, self.first_row + self.rows)
        return Problem(layer, routed, h_NS, rows)

    @property
    def all_rows(self) -> int:
        """Rows of the layer's matrices."""
        return self.first_row + self.rows + self.last_rows

    def _center(self, dtype: torch.dtype, rng: np.random.Generator) -> DenseMatrix:
        wide = normal(rng, self.all_rows, self.columns + self.gap).to(dtype)
        return DenseMatrix.of(wide[:, self.gap // 2 :][:, : self.columns])

    def _residual(
        self, expert: Expert, dtype: torch.dtype, rng: np.random.Generator
    ) -> PrunedMatrix:
        mask = rng.random((self.all_rows, self.columns)) < expert.share
        mask[rng.random(self.all_rows) < expert.empty] = False
        return pruned(mask, normal(rng, int(mask.sum())).to(dtype), expert.wide_offsets)


@dataclass(frozen=True)
class _Shape(ExpertShape):
    """A shape with columns after the output columns that no product reads."""

    extra: int = 0

    @property
    def columns(self) -> int:
        return super().columns + self.extra


class Problem(NamedTuple):
    """A layer, routed copies, activations for the output product, and the rows to use."""

    layer: LayerWeights
    routed: RoutedTokens
    h_NS: Tensor
    rows: slice

    def project_in(self, backend: HalfProductBackend, part: str = "whole") -> Tensor:
        routed = self.routed
        return backend.project_in(part, routed.x_RH, routed.copies, self.rows)

    def project_out(self, backend: HalfProductBackend, part: str = "whole") -> Tensor:
        routed = self.routed
        return backend.project_out(part, self.h_NS, routed.copies, self.rows, len(routed.x_RH))

    def copies(self) -> Iterator[tuple[int, slice, np.ndarray]]:
        """Each expert's number, copies and their tokens."""
        offsets = self.routed.offsets_L.tolist()
        for expert, (begin, end) in enumerate(pairwise(offsets)):
            yield expert, slice(begin, end), self.routed.token_N[begin:end].numpy()


def pruned(mask: np.ndarray, values: Tensor, wide_offsets: bool = False) -> PrunedMatrix:
    """A pruned matrix, built without the codec's own code. values: in row order."""
    offsets = np.concatenate([[0], mask.sum(1).cumsum()])
    tensors = {
        "bitmap": torch.from_numpy(np.packbits(mask, axis=1, bitorder="little")),
        "values": values,
        "row_offsets": torch.from_numpy(offsets.astype("i8" if wide_offsets else "i4")),
    }
    return PrunedMatrix(mask.shape, tensors, values.dtype)


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


SHARES = st.sampled_from([0.0, 0.02, 0.25, 0.6, 1.0])
# Around the numbers of copies that kernels take at a time.
FEW_COPIES = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 20, 33])
HIDDEN_SIZES = st.one_of(
    st.integers(1, 70),
    st.sampled_from([127, 128, 129, 512, 515, 700]),  # padded to 128
)


def experts(copies: st.SearchStrategy[int], most: int) -> st.SearchStrategy[tuple[Expert, ...]]:
    """One to `most` experts with any of up to three centres, or none."""
    expert = st.builds(
        Expert,
        center=st.sampled_from([None, 0, 0, 1, 2]),
        share=SHARES,
        empty=st.sampled_from([0.0, 0.3]),
        wide_offsets=st.booleans(),
        copies=copies,
        repeated=st.booleans(),
    )
    return st.lists(expert, min_size=1, max_size=most).map(tuple)


CASES = st.builds(
    Case,
    rows=st.integers(1, 40),
    hidden=HIDDEN_SIZES,
    inputs=st.sampled_from([1, 2]),
    extra=st.integers(0, 3),
    tokens=st.integers(0, 35),
    experts=experts(FEW_COPIES, 4),
    first_row=st.integers(0, 4),
    last_rows=st.sampled_from([0, 2]),
    gap=st.sampled_from([0, 1, 37]),
    unused_centers=st.integers(0, 1),
    seed=st.integers(0, 2**32 - 1),
)


def dense(problem: Problem, expert: int, part: str = "whole") -> np.ndarray:
    """The used rows of an expert, or of its residual alone, in float64.

    The sum of centre and residual is rounded once to the layer's dtype.
    """
    layer, rows = problem.layer, problem.rows
    total = decoded(layer.residuals[expert])[rows]
    center = layer.center_of[expert]
    if part == "whole" and center >= 0:
        total = total + decoded(layer.centers[center])[rows]
        # float32 is exact enough on the way that nothing is rounded twice.
        total = torch.from_numpy(total).float().to(layer.dtype).double().numpy()
    return total


def decoded(matrix: EncodedMatrix) -> np.ndarray:
    """A dense or pruned matrix in float64, decoded without the codec's own code."""
    if isinstance(matrix, DenseMatrix):
        return matrix.weight.double().numpy()
    assert isinstance(matrix, PrunedMatrix)
    total = np.zeros((matrix.rows, matrix.columns))
    kept = np.unpackbits(matrix.bitmap.numpy(), axis=1, bitorder="little")[:, : matrix.columns] == 1
    values, offsets = matrix.values.double().numpy(), matrix.row_offsets.tolist()
    for i in range(matrix.rows):
        total[i, kept[i]] = values[offsets[i] : offsets[i + 1]]
    return total


class Sums(NamedTuple):
    """Products in float64, and the sums of their terms' magnitudes."""

    exact: np.ndarray
    magnitude: np.ndarray


def sums_in(problem: Problem, part: str = "whole") -> Sums:
    x_TH = problem.routed.x_RH.double().numpy()
    H, inputs = problem.layer.hidden, problem.layer.inputs
    S = problem.rows.stop - problem.rows.start
    sums = Sums(*np.zeros((2, len(problem.routed.token_N), inputs * S)))
    for expert, copies, token_n in problem.copies():
        weights_SD = dense(problem, expert, part)
        for i in range(inputs):
            W = weights_SD[:, i * H : (i + 1) * H]
            columns = slice(i * S, (i + 1) * S)
            sums.exact[copies, columns] = x_TH[token_n] @ W.T
            sums.magnitude[copies, columns] = abs(x_TH[token_n]) @ abs(W).T
    return sums


def sums_out(problem: Problem, part: str = "whole") -> Sums:
    h_NS = problem.h_NS.double().numpy()
    H, first = problem.layer.hidden, problem.layer.inputs * problem.layer.hidden
    sums = Sums(*np.zeros((2, len(problem.routed.x_RH), H)))
    for expert, copies, token_n in problem.copies():
        W = dense(problem, expert, part)[:, first : first + H]
        for h_S, t in zip(h_NS[copies], token_n, strict=True):
            sums.exact[t] += h_S @ W
            sums.magnitude[t] += abs(h_S) @ abs(W)
    return sums


def assert_sums(found: Tensor, sums: Sums, rounding: float = ROUNDING) -> None:
    """Compare float32 sums, taken in any order, with exact ones.

    The bound is relative to the magnitudes of the terms: relative to the result, an error can be of
    any size where terms cancel. Products of bfloat16 numbers are exact in float32, so the bound is
    the same for both dtypes: only additions round.

    rounding: the bound.
    """
    assert found.dtype == torch.float32
    assert found.shape == sums.exact.shape
    error = abs(found.double().numpy() - sums.exact)
    assert (error <= rounding * sums.magnitude).all(), (error / sums.magnitude).max()


def assert_equal_numbers(found: Tensor, expected: Tensor) -> None:
    """Equal as numbers: zeros of either sign are equal, and so are NaNs."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    wrong = (found != expected) & ~(found.isnan() & expected.isnan())
    assert not wrong.any(), (found[wrong][:5], expected[wrong][:5])


def restored(
    backend: HalfProductBackend, problem: Problem, expert: int, columns: int, first_column: int = 0
) -> Tensor:
    """Some columns of the used rows of an expert."""
    rows = problem.rows
    out = torch.full((rows.stop - rows.start, columns), 99.0, dtype=problem.layer.dtype)
    backend.restore(expert, out, rows.start, first_column)
    return out


def draw_columns(case: Case, data: st.DataObject) -> tuple[int, int]:
    """Any range of columns: the first one, and how many."""
    first = data.draw(st.integers(0, case.columns), "first column")
    return first, data.draw(st.integers(0, case.columns - first), "columns")
