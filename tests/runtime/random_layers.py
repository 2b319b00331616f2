"""Layers of random experts, made without a checkpoint, and what they should give.

Legend: R rows of tokens, S rows of an expert, D columns, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resmoe_dist.codecs import PrunedResidual
from resmoe_dist.design_matrix import ExpertShape, from_rows
from resmoe_dist.families.activations import PlainActivation
from resmoe_dist.parallel.dispatcher import NO_EXPERT, DispatchedTokens, Dispatcher
from resmoe_dist.parallel.topology import SINGLE_PROCESS
from resmoe_dist.runtime.execution import Execution
from resmoe_dist.runtime.experts import CompressedExperts, ExpertGroup

EXPERTS, TOP_K, HIDDEN = 6, 3, 20
SHORT = ExpertShape(rows=37, hidden=HIDDEN)
LONG = ExpertShape(rows=150, hidden=HIDDEN, row_bias=True, output_bias=True)


class Grouping(NamedTuple):
    """Which experts have a centre in common, and which groups have none."""

    partition: list[list[int]]
    centerless: tuple[int, ...] = ()


GROUPINGS = {
    "one group": Grouping([[0, 1, 2, 3, 4, 5]]),
    "several groups": Grouping([[0, 3], [1, 4, 5], [2]]),
    "one of them without a centre": Grouping([[0, 3], [1, 4, 5], [2]], centerless=(1,)),
    "no centre at all": Grouping([[0, 1, 2, 3], [4, 5]], centerless=(0, 1)),
}
ONE, SEVERAL, MIXED, NONE = GROUPINGS.values()


def make_experts(
    shape: ExpertShape = SHORT,
    grouping: Grouping = ONE,
    codec: type = PrunedResidual,
    execution: Execution | None = None,
    dtype: torch.dtype = torch.float32,
    act: str | None = None,
) -> CompressedExperts:
    """A layer of random experts; everything matters about as much to its output.

    act: a transformers activation name, silu or relu unless given.
    """
    groups = []
    for g, experts in enumerate(grouping.partition):
        has_center = codec.uses_center and g not in grouping.centerless
        size = (shape.rows, shape.columns)
        residuals = [codec.encode(0.3 * torch.randn(size), keep=0.3, dtype=dtype) for _ in experts]
        biases = [torch.randn(shape.hidden).to(dtype) for _ in experts if shape.output_bias]
        center = (0.3 * torch.randn(size)).to(dtype) if has_center else None
        groups.append(ExpertGroup(experts, center, residuals, biases))
    activation = PlainActivation(act or ("silu" if shape.gated else "relu"))
    return CompressedExperts(shape, groups, activation, execution)


def routed(tokens: int, dtype: torch.dtype = torch.float32, top_k: int = TOP_K) -> DispatchedTokens:
    """Random tokens to random experts: some twice to the same, some copies to none."""
    index_TK = torch.randint(NO_EXPERT, EXPERTS, (tokens, top_k))
    return to_experts(index_TK, torch.randn(tokens, HIDDEN).to(dtype))


def to_experts(
    index_TK: Tensor, x_TH: Tensor, weights_TK: Tensor | None = None
) -> DispatchedTokens:
    """Tokens to the experts of this process; with random weights unless they are given."""
    if weights_TK is None:
        weights_TK = torch.rand(index_TK.shape)
    return Dispatcher(EXPERTS, SINGLE_PROCESS).dispatch(x_TH, index_TK, weights_TK)[0]


def naive(
    experts: CompressedExperts,
    tokens: DispatchedTokens,
    act: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The sum over each token's experts, one copy after the other, in float64.

    act: what the layer has between its products, silu or relu unless given.
    """
    act = act or (F.silu if experts.shape.gated else F.relu)
    out_RH = torch.zeros(tokens.x_RH.shape, dtype=torch.float64)
    # Copies are sorted by expert, experts by number.
    of_number = {k: (group, i) for group in experts.groups for i, k in enumerate(group.experts)}
    expert_N = [k for k, count in enumerate(tokens.counts_L) for _ in range(count)]
    copies = zip(expert_N, tokens.row_N.tolist(), tokens.weight_N.double(), strict=True)
    for k, row, weight in copies:
        group, i = of_number[k]
        dense_SD = copy.deepcopy(group.residuals[i]).double().decode()
        if group.center is not None:
            dense_SD = dense_SD + group.center.double()
        w = from_rows(experts.shape, dense_SD)
        x_H = tokens.x_RH[row].double()
        pre = [w[name] @ x_H + w.get(f"{name}_bias", 0) for name in experts.shape.inputs]
        h_S = act(pre[0]) * pre[1] if len(pre) == 2 else act(pre[0])
        y_H = w[experts.shape.output] @ h_S
        if experts.shape.output_bias:
            y_H = y_H + group.output_biases[i].double()
        out_RH[row] += weight * y_H
    return out_RH
