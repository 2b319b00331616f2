"""Whole MLPs for the kernels, of all shapes, and what is exact about them: float64 in NumPy.

Legend: T tokens, N copies, n copies of one job, S rows, H hidden, D columns, J jobs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.kernels.rows import CompressedRows
from tests.kernels.problems import PARTS, RESIDUALS, ROUNDING, Case, Part, dense, normal

# Of an activation that is multiplied by the output columns: half a unit of its last place.
H_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class SharingPart(Part):
    """A job that takes the shared centre of this number besides its own rows."""

    center: bool = False
    shared: int = 0


@dataclass(frozen=True)
class MlpCase:
    """case: whose parts may be `SharingPart`. size: of a product, about. gap: as of `Part`, of the
    shared centres. unused: so many come last that none of the jobs, if there are any, takes.
    """

    case: Case
    activation: str = "silu"
    size: float = 1.0
    unused: int = 0
    gap: int = 0

    def build(self, dtype: torch.dtype) -> MlpProblem:
        """Standard normal tensors, but for the tokens."""
        problem = self.case.build(dtype)
        rng = np.random.default_rng([self.case.seed, 1])
        center_J = [getattr(part, "shared", -1) for part in self.case.parts]
        part = Part(share=None, before=1, after=1, gap=self.gap)
        centers = [
            self.case.make_rows(part, dtype, rng).center
            for _ in range(max(center_J) + 1 + self.unused if center_J else 0)
        ]
        # A power of two rounds nothing.
        scale = 2.0 ** round(math.log2(self.size / math.sqrt(self.case.hidden)))
        return MlpProblem(
            x_TH=problem.x_TH * scale,
            token_N=problem.token_N,
            weight_N=normal(rng, len(problem.token_N)),
            counts_J=problem.counts_J,
            jobs=problem.jobs,
            centers=centers,
            center_J=center_J,
            inputs=self.case.inputs,
            activation=self.activation,
        )


class MlpProblem(NamedTuple):
    """What `mlp` takes, in its order."""

    x_TH: Tensor
    token_N: Tensor
    weight_N: Tensor
    counts_J: list[int]
    jobs: list[CompressedRows]
    centers: list[Tensor]
    center_J: list[int]
    inputs: int
    activation: str

    def taking_centers_along(self) -> MlpProblem:
        """Each job with its shared centre as its own."""
        jobs = [
            job if center < 0 else replace(job, center=self.centers[center])
            for job, center in zip(self.jobs, self.center_J, strict=True)
        ]
        return self._replace(jobs=jobs, centers=[], center_J=[-1] * len(jobs))


SHARING = st.builds(
    SharingPart,
    share=st.sampled_from([0.0, 0.02, 0.25, 0.6, 1.0]),
    empty=st.sampled_from([0.0, 0.3]),
    before=st.integers(0, 4),
    after=st.sampled_from([0, 2]),
    wide_offsets=st.booleans(),
    shared=st.integers(0, 2),
)
# Around what is taken at a time, and from which on copies are packed.
COPIES = st.sampled_from([0, 1, 2, 6, 7, 11, 12, 13, 16, 17, 33, 64, 65, 130])
MLP_CASES = st.builds(
    MlpCase,
    case=st.builds(
        Case,
        rows=st.integers(1, 60),
        hidden=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 512, 515, 700])),
        inputs=st.sampled_from([1, 2]),
        extra=st.integers(0, 3),
        tokens=st.one_of(st.integers(0, 20), st.sampled_from([33, 66, 130])),
        parts=st.lists(
            st.builds(
                lambda part, copies, repeated: replace(part, copies=copies, repeated=repeated),
                st.one_of(PARTS, RESIDUALS, SHARING),
                COPIES,
                st.booleans(),
            ),
            max_size=5,
        ).map(tuple),
        one_center=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    ),
    activation=st.sampled_from(["silu", "gelu_tanh", "relu"]),
    # Some of which an activation makes zero of, or leaves as they are.
    size=st.sampled_from([0.25, 1.0, 4.0, 64.0]),
    unused=st.integers(0, 1),
    gap=st.sampled_from([0, 1, 37]),
)


def activate(activation: str, x: np.ndarray) -> np.ndarray:
    """By the activations' definitions, in float64."""
    if activation == "relu":
        return np.maximum(x, 0)
    if activation == "silu":
        return x * 0.5 * (1 + np.tanh(x / 2))
    assert activation == "gelu_tanh"
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Outputs(NamedTuple):
    """Of `mlp` in float64, and how far from that one in float32 or bfloat16 may be."""

    exact: np.ndarray
    bound: np.ndarray


def outputs(case: MlpCase, problem: MlpProblem) -> Outputs:
    """What `mlp` should give; only the sums of centre and residual are rounded.

    The bound, with ε = ROUNDING, exact products p of magnitude m (see `assert_sums`), h = g · a(p₀)
    · p₁, or without p₁ where there is one input:

    - A product in float32 is within ε m of p.
    - The slopes of the activations are below 1.13, so that they pass on no more than 1.13 ε m₀ of
      it. Their own roundings are fewer than 8 units of 2⁻²⁴ of p₀: two units in the last place of
      the exponential are four such, a sum and a quotient two, and the rounding of the cubic in
      gelu, which e^z magnifies by |z|, five times max |z| σ(z) σ(-z) = 0.224. With 8 · 2⁻²⁴ = ε/2
      that is less than 2 ε m₀ in all.
    - So h is within |g| (2 ε m₀ (|p₁| + ε m₁) + ε m₁ |a|) + ε |h|, the last for two products.
    - In bfloat16 it is rounded once more, by up to 2⁻⁸ of itself, and so is the sum of the h of a
      shared centre's copies.
    - The sums of h · w in float32 add ε Σ |h| |w|.
    """
    x_TH = problem.x_TH.double().numpy()
    tokens, hidden = x_TH.shape
    inputs, columns = problem.inputs, (problem.inputs + 1) * hidden
    found = Outputs(*np.zeros((2, tokens, hidden)))
    h_rounding = H_ROUNDING[problem.x_TH.dtype]
    end = 0
    for rows, count, center in zip(problem.jobs, problem.counts_J, problem.center_J, strict=True):
        begin, end = end, end + count
        token_n = problem.token_N[begin:end].numpy()
        g_n1 = problem.weight_N[begin:end].double().numpy()[:, None]
        parts = [dense(rows, case.case.columns)]
        if center >= 0:
            parts.append(problem.centers[center].double().numpy())
        x_nH = x_TH[token_n]
        p, m = [], []
        for i in range(inputs):
            these = slice(i * hidden, (i + 1) * hidden)
            p.append(sum(x_nH @ part[:, these].T for part in parts))
            m.append(sum(abs(x_nH) @ abs(part[:, these]).T for part in parts))
        a_nS = activate(problem.activation, p[0])
        p1, m1 = (p[1], m[1]) if inputs == 2 else (1.0, 0.0)
        h_nS = g_n1 * a_nS * p1
        error = 2 * ROUNDING * m[0] * (abs(p1) + ROUNDING * m1) + ROUNDING * m1 * abs(a_nS)
        error = abs(g_n1) * error * (1 + h_rounding) + (2 * ROUNDING + h_rounding) * abs(h_nS)
        # Added up over copies first, of which there are more than rows.
        sums = np.zeros((2, tokens, rows.count))
        np.add.at(sums[0], token_n, h_nS)
        np.add.at(sums[1], token_n, error)
        for part in parts:
            out_SH = part[:, inputs * hidden : columns]
            found.exact[:] += sums[0] @ out_SH
            found.bound[:] += sums[1] @ abs(out_SH)
    return found


def assert_outputs(found: Tensor, expected: Outputs) -> None:
    assert found.dtype == torch.float32
    assert found.shape == expected.exact.shape
    error = abs(found.double().numpy() - expected.exact)
    assert (error <= expected.bound).all(), (error / expected.bound).max()
