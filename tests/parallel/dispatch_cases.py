"""Tokens and routings for tests of dispatch, and the sums that experts should make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resmoe_dist.parallel.topology import Topology
from resmoe_dist.routing import NO_EXPERT, RoutedTokens

EXPERTS, TOP_K, HIDDEN, MAX_LANES = 8, 3, 5, 4
# Tensor-parallel ranks contribute these shares of an expert's output: exact in any dtype.
TP_SHARES = {1: (1.0,), 2: (0.25, 0.75)}


@dataclass(frozen=True)
class Case:
    """Tokens of each lane, and which of the experts their copies go to."""

    tokens: tuple[int, ...]
    experts: tuple[int, ...] = tuple(range(EXPERTS))
    dtype: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32
    seed: int = 0


ALL = tuple(range(EXPERTS))
CASES = {
    "even": Case((4, 4, 4, 4)),
    "uneven": Case((5, 1, 3, 2)),
    "uneven, other tokens beside lane 0": Case((5, 7, 0, 4), seed=1),
    "no tokens on lane 0": Case((0, 3, 1, 2)),
    "no tokens on lane 1": Case((3, 0, 6, 0)),
    "no tokens anywhere": Case((0, 0, 0, 0)),
    "one token": Case((1, 1, 1, 1)),
    "copies that go nowhere": Case((6, 2, 5, 4), experts=(NO_EXPERT, NO_EXPERT, *ALL)),
    "nothing goes anywhere": Case((3, 2, 1, 4), experts=(NO_EXPERT,)),
    "one expert": Case((5, 3, 2, 4), experts=(5,)),
    "experts of one rank": Case((5, 3, 2, 4), experts=(0, 1)),
    "bfloat16": Case((5, 1, 3, 2), dtype=torch.bfloat16),
    "bfloat16 weights": Case((5, 1, 3, 2), dtype=torch.bfloat16, weights=torch.bfloat16),
    "large": Case((700, 33, 0, 120)),
}


class Inputs(NamedTuple):
    """What one lane gives to `dispatch`."""

    x_TH: Tensor
    index_TK: Tensor
    weights_TK: Tensor


def inputs(name: str, lane: int) -> Inputs:
    """The tokens of one lane. Lane 0's do not depend on the other lanes of the case."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(1000 * lane + (case.seed if lane else 0))
    tokens = case.tokens[lane]
    chosen = torch.randint(len(case.experts), (tokens, TOP_K), generator=generator)
    return Inputs(
        torch.randn(tokens, HIDDEN, generator=generator).to(case.dtype),
        torch.tensor(case.experts)[chosen],
        torch.rand(tokens, TOP_K, generator=generator).to(case.weights),
    )


def expert_output(x_H: Tensor, expert: int) -> Tensor:
    """A different function for each expert; none maps zero to zero."""
    return x_H * (expert + 1) + expert + 0.5


def copies_of(routed: RoutedTokens) -> list[tuple[int, int, float]]:
    """(local expert, row, weight) of every copy that an expert runs."""
    counts = routed.offsets_L.diff().tolist()
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows, weights = routed.token_N.tolist(), routed.weight_N.tolist()
    return list(zip(experts, rows, weights, strict=False))


def partial_sums(routed: RoutedTokens, topology: Topology) -> Tensor:
    """This rank's part of its experts' outputs: weighted, added up per row, rounded once."""
    owned = topology.owned_experts(EXPERTS)
    share = TP_SHARES[topology.tp][topology.tp_rank]
    y_RH = torch.zeros(routed.x_RH.shape)
    for expert, row, weight in copies_of(routed):
        x_H = routed.x_RH[row].float()
        y_RH[row] += share * weight * expert_output(x_H, owned[expert])
    return y_RH.to(routed.x_RH.dtype)


class Sums(NamedTuple):
    """Each token's weighted sum over its experts, and the sum of its terms' magnitudes."""

    exact: np.ndarray
    magnitude: np.ndarray


def exact_sums(name: str, lane: int) -> Sums:
    """In float64, token by token."""
    x_TH, index_TK, weights_TK = inputs(name, lane)
    sums = Sums(*np.zeros((2, *x_TH.shape)))
    for t, k in np.ndindex(*index_TK.shape):
        expert = int(index_TK[t, k])
        if expert != NO_EXPERT:
            weight, x_H = float(weights_TK[t, k]), x_TH[t].double()
            sums.exact[t] += weight * expert_output(x_H, expert).numpy()
            # Everything that `expert_output` adds up is positive then.
            sums.magnitude[t] += weight * expert_output(x_H.abs(), expert).numpy()
    return sums
