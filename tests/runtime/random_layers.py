"""Layers of random experts, made without a checkpoint, and their exact outputs.

Legend: R tokens, S rows of an expert, D columns, H hidden, K experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resmoe_dist.codecs import CodecSpec, EncodedMatrix
from resmoe_dist.design_matrix import ExpertShape, from_rows
from resmoe_dist.families.activations import PlainActivation
from resmoe_dist.kernels import LayerWeights
from resmoe_dist.routing import NO_EXPERT, RoutedTokens
from resmoe_dist.runtime.execution import Execution
from resmoe_dist.runtime.experts import CompressedExperts

EXPERTS, TOP_K, HIDDEN = 6, 3, 20
SHORT = ExpertShape(rows=37, hidden=HIDDEN)
LONG = ExpertShape(rows=150, hidden=HIDDEN, row_bias=True, output_bias=True)


class Grouping(NamedTuple):
    """Which experts share a centre, and which groups have no centre."""

    partition: list[list[int]]
    centerless: tuple[int, ...] = ()

    def center_of(self) -> tuple[int, ...]:
        """Number of each expert's centre, -1 for none."""
        groups = [g for g in range(len(self.partition)) if g not in self.centerless]
        numbers = {
            k: groups.index(g) if g in groups else -1
            for g, experts in enumerate(self.partition)
            for k in experts
        }
        return tuple(numbers[k] for k in sorted(numbers))


GROUPINGS = {
    "one group": Grouping([[0, 1, 2, 3, 4, 5]]),
    "several groups": Grouping([[0, 3], [1, 4, 5], [2]]),
    "one group without a centre": Grouping([[0, 3], [1, 4, 5], [2]], centerless=(1,)),
    "no centres": Grouping([[0, 1, 2, 3], [4, 5]], centerless=(0, 1)),
}
ONE, SEVERAL, MIXED, NONE = GROUPINGS.values()

# Codecs of residuals that tests run through every execution. `dense` has no centres beside it.
CODECS = {"pruned": "pruned:keep=0.3", "low_rank": "low_rank:keep=0.3", "dense": "dense"}


def encoded(codec: str, matrix_SD: Tensor, dtype: torch.dtype) -> EncodedMatrix:
    """A matrix by a codec, written as users write it."""
    spec = CodecSpec.parse(codec)
    return spec.codec.encode(matrix_SD, spec.config, dtype)


def make_layer(
    shape: ExpertShape = SHORT,
    grouping: Grouping = ONE,
    codec: str = CODECS["pruned"],
    dtype: torch.dtype = torch.float32,
    act: str | None = None,
    center_codec: str = "dense",
) -> LayerWeights:
    """The weights of a layer of random experts; centre and residual matter about equally."""
    if codec == "dense":
        grouping = Grouping(grouping.partition, tuple(range(len(grouping.partition))))
    size = (shape.rows, shape.columns)
    residuals = [encoded(codec, 0.3 * torch.randn(size), dtype) for _ in range(EXPERTS)]
    centers = [
        encoded(center_codec, 0.3 * torch.randn(size), dtype)
        for _ in range(len(grouping.partition) - len(grouping.centerless))
    ]
    activation = PlainActivation(act or ("silu" if shape.gated else "relu"))
    return LayerWeights(shape, tuple(residuals), tuple(centers), grouping.center_of(), activation)


def make_experts(
    shape: ExpertShape = SHORT,
    grouping: Grouping = ONE,
    codec: str = CODECS["pruned"],
    execution: Execution | None = None,
    dtype: torch.dtype = torch.float32,
    act: str | None = None,
    center_codec: str = "dense",
) -> CompressedExperts:
    """A layer of random experts.

    act: a transformers activation name; silu for gated experts and relu for others by default.
    """
    layer = make_layer(shape, grouping, codec, dtype, act, center_codec)
    bias_LH = torch.randn(EXPERTS, shape.hidden).to(dtype) if shape.output_bias else None
    return CompressedExperts(layer, execution, bias_LH)


def random_tokens(
    tokens: int, dtype: torch.dtype = torch.float32, top_k: int = TOP_K
) -> RoutedTokens:
    """Random tokens to random experts: some twice to the same expert, some copies dropped."""
    index_TK = torch.randint(NO_EXPERT, EXPERTS, (tokens, top_k))
    return to_experts(index_TK, torch.randn(tokens, HIDDEN).to(dtype))


def to_experts(index_TK: Tensor, x_TH: Tensor, weights_TK: Tensor | None = None) -> RoutedTokens:
    """Tokens to chosen experts, with random weights unless they are given."""
    if weights_TK is None:
        weights_TK = torch.rand(index_TK.shape)
    return RoutedTokens.from_routing(x_TH, index_TK, weights_TK, EXPERTS)


def naive(
    experts: CompressedExperts,
    routed: RoutedTokens,
    act: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The sum over each token's experts, one copy after the other, in float64.

    act: the layer's activation; silu for gated experts and relu for others by default.
    """
    layer = experts.layer
    act = act or (F.silu if layer.shape.gated else F.relu)
    out_RH = torch.zeros(routed.x_RH.shape, dtype=torch.float64)
    offsets = routed.offsets_L.tolist()
    for k, (begin, end) in enumerate(pairwise(offsets)):
        dense_SD = decoded(layer.residuals[k])
        if layer.center_of[k] >= 0:
            dense_SD = dense_SD + decoded(layer.centers[layer.center_of[k]])
        w = from_rows(layer.shape, dense_SD)
        for n in range(begin, end):
            row, weight = int(routed.token_N[n]), routed.weight_N[n].double()
            x_H = routed.x_RH[row].double()
            pre = [w[name] @ x_H + w.get(f"{name}_bias", 0) for name in layer.shape.inputs]
            h_S = act(pre[0]) * pre[1] if len(pre) == 2 else act(pre[0])
            y_H = w[layer.shape.output] @ h_S
            if experts.output_bias_LH is not None:
                y_H = y_H + experts.output_bias_LH[k].double()
            out_RH[row] += weight * y_H
    return out_RH


def decoded(matrix: EncodedMatrix) -> Tensor:
    """A matrix in float64: decoded after its stored values were widened."""
    return copy.deepcopy(matrix).double().decode()


def restored_bytes(shape: ExpertShape) -> int:
    """Bytes of one expert, restored in float32."""
    return shape.entries * 4
