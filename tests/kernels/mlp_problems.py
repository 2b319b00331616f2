"""Whole MLPs on random layers, and the exact results in NumPy's float64.

Legend: T tokens, N routed copies, n copies of one expert, S rows, H hidden, D columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.problems import (
    HIDDEN_SIZES,
    ROUNDING,
    Case,
    Problem,
    decoded,
    dense,
    experts,
)

# Rounding error of an activation before the output product: half a unit in the last place.
H_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class MlpCase:
    """activation: by the name that kernels know. size: typical magnitude of an input product."""

    case: Case
    activation: str = "silu"
    size: float = 1.0

    def build(self, dtype: torch.dtype, fused: bool = True) -> Problem:
        """Standard normal tensors, except for the tokens."""
        problem = self.case.build(dtype, self.activation, fused)
        # Scaling by a power of two rounds nothing.
        scale = 2.0 ** round(math.log2(self.size / math.sqrt(self.case.hidden)))
        problem.routed.x_RH.mul_(scale)
        return problem


# Around the numbers of copies that kernels take at a time, and from which on they pack copies.
COPIES = st.sampled_from([0, 1, 2, 6, 7, 11, 12, 13, 16, 17, 33, 64, 65, 130])
MLP_CASES = st.builds(
    MlpCase,
    case=st.builds(
        Case,
        rows=st.integers(1, 60),
        hidden=HIDDEN_SIZES,
        inputs=st.sampled_from([1, 2]),
        extra=st.integers(0, 3),
        tokens=st.one_of(st.integers(0, 20), st.sampled_from([33, 66, 130])),
        experts=experts(COPIES, 5),
        gap=st.sampled_from([0, 1, 37]),
        unused_centers=st.integers(0, 1),
        seed=st.integers(0, 2**32 - 1),
    ),
    activation=st.sampled_from(["silu", "gelu_tanh", "relu"]),
    # Some are so small or large that an activation is linear or zero there.
    size=st.sampled_from([0.25, 1.0, 4.0, 64.0]),
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
    """Outputs of `mlp` in float64, and how far a float32 or bfloat16 result may be from them."""

    exact: np.ndarray
    bound: np.ndarray


def outputs(problem: Problem, *, share_center: bool) -> Outputs:
    """What `mlp` should give. Without sharing, the sums of centre and residual are rounded.

    The bound, with ε = ROUNDING, exact products p of magnitude m (see `assert_sums`), h = g · a(p₀)
    · p₁, or without p₁ for one input:

    - A product in float32 is within ε m of p.
    - The activations' slopes are below 1.13, so they pass on at most 1.13 ε m₀. Their own roundings
      are fewer than 8 units of 2⁻²⁴ of p₀: two units in the last place of the exponential are four
      such units, a sum and a quotient two, and the rounding of the cubic in gelu, which e^z
      magnifies by |z|, five times max |z| σ(z) σ(-z) = 0.224. With 8 · 2⁻²⁴ = ε/2 that is less than
      2 ε m₀ in all.
    - So h is within |g| (2 ε m₀ (|p₁| + ε m₁) + ε m₁ |a|) + ε |h|, the last for two products.
    - In bfloat16 it is rounded once more, by up to 2⁻⁸ of itself, and so is the sum of the h of a
      shared centre's copies.
    - The sums of h · w in float32 add ε Σ |h| |w|.
    """
    routed, layer = problem.routed, problem.layer
    x_TH = routed.x_RH.double().numpy()
    (tokens, hidden), inputs = x_TH.shape, layer.inputs
    columns = (inputs + 1) * hidden
    activation = layer.activation.kernel
    found = Outputs(*np.zeros((2, tokens, hidden)))
    h_rounding = H_ROUNDING[layer.dtype]
    for expert, copies, token_n in problem.copies():
        g_n1 = routed.weight_N[copies].double().numpy()[:, None]
        center = layer.center_of[expert]
        parts = [dense(problem, expert, "residual" if share_center else "whole")]
        if share_center and center >= 0:
            parts.append(decoded(layer.centers[center]))
        x_nH = x_TH[token_n]
        p, m = [], []
        for i in range(inputs):
            these = slice(i * hidden, (i + 1) * hidden)
            p.append(sum(x_nH @ part[:, these].T for part in parts))
            m.append(sum(abs(x_nH) @ abs(part[:, these]).T for part in parts))
        a_nS = activate(activation, p[0])
        p1, m1 = (p[1], m[1]) if inputs == 2 else (1.0, 0.0)
        h_nS = g_n1 * a_nS * p1
        error = 2 * ROUNDING * m[0] * (abs(p1) + ROUNDING * m1) + ROUNDING * m1 * abs(a_nS)
        error = abs(g_n1) * error * (1 + h_rounding) + (2 * ROUNDING + h_rounding) * abs(h_nS)
        # Summed over copies before the product: there are more copies than rows.
        sums = np.zeros((2, tokens, layer.rows))
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
