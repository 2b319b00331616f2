"""Random quantised layers, and exact results decoded and multiplied in NumPy without the codec.

Legend: T tokens, N routed copies, n copies of one expert, S rows, H hidden, D columns, P bytes of a
row's stream, E entries of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.codecs import DenseMatrix, EncodedMatrix, QuantizedMatrix
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.kernels import LayerWeights
from resmoe_dist.routing import RoutedTokens
from tests.kernels.mlp_problems import activate
from tests.kernels.problems import PlainActivation, Problem, normal

CODERS = ("scalar", "trellis")
# Bits of a window of `trellis`.
STATE_BITS = 12


@dataclass(frozen=True)
class Coding:
    """How a matrix is coded. group: entries that share a scale, None for a whole projection."""

    bits: int = 3
    coder: str = "trellis"
    group: int | None = 64

    @property
    def window(self) -> int:
        """Bits of a window."""
        return self.bits if self.coder == "scalar" else STATE_BITS


CODINGS = [Coding(bits, "scalar") for bits in (1, 2, 3, 4, 8)]
CODINGS += [Coding(bits, "trellis") for bits in (1, 2, 3, 4)]


@dataclass(frozen=True)
class QuantizedExpert:
    """One expert, and the copies that are routed to it: see `problems.Expert`."""

    coding: Coding = Coding()
    center: int | None = 0
    copies: int = 1
    repeated: bool = False


@dataclass(frozen=True)
class QuantizedCase:
    """Sizes of a random layer: see `problems.Case`. All centres have the same coding."""

    rows: int
    hidden: int
    inputs: int = 2
    row_bias: bool = False
    rotated: bool = True
    tokens: int = 1
    experts: tuple[QuantizedExpert, ...] = (QuantizedExpert(),)
    center_coding: Coding = Coding(4, "scalar", None)
    first_row: int = 0
    last_rows: int = 0
    seed: int = 0

    def build(self, dtype: torch.dtype, activation: str = "silu", fused: bool = True) -> Problem:
        """Weights of a magnitude that makes input products about 1."""
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
        numbers = [-1 if expert.center is None else expert.center for expert in self.experts]
        residuals = [self._matrix(expert.coding, dtype, rng) for expert in self.experts]
        centers = [self._matrix(self.center_coding, dtype, rng) for _ in range(max(numbers) + 1)]
        layer = LayerWeights(
            self._shape,
            tuple(residuals),
            tuple(centers),
            tuple(numbers),
            PlainActivation(activation, fused=fused),
        )
        routed = RoutedTokens(
            x_RH=normal(rng, self.tokens, self.hidden).to(dtype),
            token_N=torch.from_numpy(np.concatenate(token_N).astype(np.int64)),
            weight_N=normal(rng, sum(counts)),
            offsets_L=torch.tensor([0, *np.cumsum(counts)]),
        )
        h_NS = normal(rng, sum(counts), self.rows).to(dtype)
        return Problem(layer, routed, h_NS, slice(0, self.rows))

    @property
    def _shape(self) -> ExpertShape:
        return ExpertShape(self.rows, self.hidden, self.inputs == 2, self.row_bias)

    def _matrix(
        self, coding: Coding, dtype: torch.dtype, rng: np.random.Generator
    ) -> QuantizedMatrix:
        """Rows `first_row` on of a larger random matrix, sliced as tensor parallelism does."""
        rows, blocks = self.first_row + self.rows + self.last_rows, self.inputs + 1
        extra = self.inputs if self.row_bias else 0
        stream = coding.bits * blocks * self.hidden + coding.window - coding.bits
        bits = rng.integers(0, 2, (rows, stream), dtype=np.uint8)
        group = min(coding.group or self.hidden, self.hidden)
        groups = -(-self.hidden // group)
        scales = rng.integers(200, 256, (rows, blocks * groups), dtype=np.uint8)
        scales[rng.random(scales.shape) < 0.05] = 0
        # Typical magnitude of the integers at the largest scale.
        size = 250.0 if coding.coder == "trellis" else 2.0**coding.bits
        layout = (coding.bits, CODERS.index(coding.coder), blocks, self.hidden, group)
        tensors = {
            "codes": torch.from_numpy(np.packbits(bits, axis=1, bitorder="little")),
            "scales": torch.from_numpy(scales),
            "biases": normal(rng, rows, extra).to(dtype),
            "top": torch.tensor([2 / size / self.hidden**0.5]),
            "layout": torch.tensor([*layout, int(self.rotated)], dtype=torch.int32),
        }
        matrix = QuantizedMatrix((rows, blocks * self.hidden + extra), tensors, dtype)
        return matrix.slice_rows(self.first_row, self.first_row + self.rows)


def with_dense_centers(problem: Problem) -> Problem:
    """The same residuals with other, dense centres."""
    layer = problem.layer
    rng = np.random.default_rng(layer.num_experts)
    scale = layer.hidden**-0.5
    centers = tuple(
        DenseMatrix.of((normal(rng, center.rows, center.columns) * scale).to(layer.dtype))
        for center in layer.centers
    )
    return problem._replace(layer=replace(layer, centers=centers))


def decoded(matrix: EncodedMatrix) -> np.ndarray:
    """A matrix [S, D] in float64; if quantised, entry by entry from the format's definition."""
    if isinstance(matrix, DenseMatrix):
        return matrix.weight.double().numpy()
    assert isinstance(matrix, QuantizedMatrix)
    bits, coder, blocks, hidden, group, rotated = matrix.layout.tolist()
    window = bits if CODERS[coder] == "scalar" else STATE_BITS
    stream_RB = np.unpackbits(matrix.codes.numpy(), axis=1, bitorder="little").astype(np.int64)
    first_E = bits * np.arange(blocks * hidden)
    windows_RE = sum(stream_RB[:, first_E + k] << k for k in range(window))
    if CODERS[coder] == "scalar":
        integers_RE = 2 * windows_RE - (2**bits - 1)
    else:
        products = [(windows_RE + 14 * 4096) * factor % 2**16 for factor in (59041, 5771)]
        integers_RE = sum(
            (product >> shift).astype(np.int8).astype(np.int64)
            for product in products
            for shift in (0, 8)
        )
    scales = matrix.scales.numpy().astype(np.float64)
    scales = np.where(scales > 0, float(matrix.top) * 2 ** ((scales - 255) / 16), 0)
    entry_E = np.arange(blocks * hidden)
    groups = -(-hidden // group)
    entries_RE = integers_RE * scales[:, entry_E // hidden * groups + entry_E % hidden // group]
    if rotated:
        q_HH = rotation(hidden)
        entries_RE = np.concatenate(
            [entries_RE[:, b * hidden : (b + 1) * hidden] @ q_HH for b in range(blocks)], axis=1
        )
    return np.concatenate([entries_RE, matrix.biases.double().numpy()], axis=1)


def rotation(hidden: int) -> np.ndarray:
    """Q [H, H]: W = W' Q for the coded W', from Sylvester's construction."""
    size = hidden & -hidden
    if size < 16:
        return np.eye(hidden)
    block = np.ones((1, 1))
    while len(block) < size:
        block = np.block([[block, block], [block, -block]]) / np.sqrt(2)
    mixed = np.arange(1, hidden + 1, dtype=np.uint64) * 0x9E3779B9 & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return np.kron(np.eye(hidden // size), block) * (1.0 - 2.0 * (mixed >> 31))


class Outputs(NamedTuple):
    """Outputs [T, H] of `mlp` in float64, and the norm [T] to expect of them.

    The norm is that of independent terms, so it is positive also where terms cancel.
    """

    exact: np.ndarray
    size: np.ndarray


def quantized_outputs(problem: Problem) -> Outputs:
    """What `mlp` should give, without any rounding."""
    routed, layer = problem.routed, problem.layer
    x_TH, hidden, inputs = routed.x_RH.double().numpy(), layer.hidden, layer.inputs
    exact, squares = np.zeros(x_TH.shape), np.zeros(len(x_TH))
    for expert, copies, token_n in problem.copies():
        matrices = [layer.residuals[expert]]
        if layer.center_of[expert] >= 0:
            matrices.append(layer.centers[layer.center_of[expert]])
        parts = [decoded(matrix) for matrix in matrices]
        whole_SD, x_nH = sum(parts), x_TH[token_n]
        energy_SD = sum(part**2 for part in parts)
        h_nS = routed.weight_N[copies].double().numpy()[:, None]
        size_nS = abs(h_nS)
        for i in range(inputs):
            columns = slice(i * hidden, (i + 1) * hidden)
            p_nS = x_nH @ whole_SD[:, columns].T
            if layer.shape.row_bias:
                p_nS += whole_SD[:, (inputs + 1) * hidden + i]
            norm_S = np.sqrt(energy_SD[:, columns].sum(1) / hidden)
            size_nS = size_nS * np.maximum(
                abs(p_nS), np.linalg.norm(x_nH, axis=1)[:, None] * norm_S
            )
            h_nS = h_nS * (p_nS if i else activate(layer.activation.name, p_nS))
        out = slice(inputs * hidden, (inputs + 1) * hidden)
        np.add.at(exact, token_n, h_nS @ whole_SD[:, out])
        np.add.at(squares, token_n, size_nS**2 @ energy_SD[:, out].sum(1))
    return Outputs(exact, np.sqrt(squares))


def assert_close(found: Tensor, expected: Outputs, tolerance: float) -> None:
    """The Euclidean error of each token is at most `tolerance` of its size."""
    assert found.dtype == torch.float32
    assert found.shape == expected.exact.shape
    error = np.linalg.norm(found.double().numpy() - expected.exact, axis=1)
    assert (error <= tolerance * expected.size).all(), (error / expected.size).max()


# With and without a rotation, around the steps that kernels take.
HIDDEN_SIZES = st.sampled_from([1, 7, 16, 31, 32, 33, 48, 64, 80, 96, 100, 128, 129, 160, 320, 515])
CODING = st.builds(
    lambda coding, group: Coding(coding.bits, coding.coder, group),
    st.sampled_from(CODINGS),
    st.sampled_from([32, 64, 128, None]),
)


def quantized_cases(copies: st.SearchStrategy[int]) -> st.SearchStrategy[QuantizedCase]:
    """Layers of up to four experts of any coding, with any of up to two centres."""
    expert = st.builds(
        QuantizedExpert,
        coding=CODING,
        center=st.sampled_from([None, 0, 0, 1]),
        copies=copies,
        repeated=st.booleans(),
    )
    return st.builds(
        QuantizedCase,
        rows=st.integers(1, 70),
        hidden=HIDDEN_SIZES,
        inputs=st.sampled_from([1, 2]),
        rotated=st.booleans(),
        tokens=st.integers(0, 20),
        experts=st.lists(expert, min_size=1, max_size=4).map(tuple),
        center_coding=CODING,
        first_row=st.integers(0, 3),
        last_rows=st.integers(0, 2),
        seed=st.integers(0, 2**32 - 1),
    )
