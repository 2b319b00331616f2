"""A MoE layer with random weights, compressed and dense: what kernels are timed on.

Legend: T tokens, K experts per token, E experts, I rows, H hidden, D columns, S rows of a block.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from resmoe_dist.codecs import EncodedResidual, LowRankResidual, PrunedResidual
from resmoe_dist.codecs.bitmap import pack_bitmap
from resmoe_dist.codecs.low_rank import rank_for
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.families.activations import PlainActivation
from resmoe_dist.runtime.experts import CompressedExperts, ExpertGroup
from resmoe_dist.runtime.layer import ResMoE
from resmoe_dist.runtime.planning import execution_for

DTYPE = torch.bfloat16
_STD = 0.02
_BLOCK_ENTRIES = 1 << 24


@dataclass(frozen=True)
class LayerShape:
    """A layer of E gated experts, `top_k` of them for each token."""

    name: str
    hidden: int
    rows: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return self.name

    @property
    def expert(self) -> ExpertShape:
        """Of each."""
        return ExpertShape(self.rows, self.hidden)

    @property
    def expert_bytes(self) -> int:
        """Of each, dense."""
        return self.expert.entries * DTYPE.itemsize


# The halves are what each of two tensor-parallel ranks has.
SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape("mixtral", 4096, 14336, 8, 2),
        LayerShape("mixtral-half", 4096, 7168, 8, 2),
        LayerShape("deepseek", 2048, 1408, 64, 6),
        LayerShape("deepseek-half", 2048, 704, 64, 6),
        LayerShape("qwen3", 2048, 768, 128, 8),
        LayerShape("qwen3-half", 2048, 384, 128, 8),
    )
}


def layer_shape(text: str) -> LayerShape:
    """A shape by name, or by its numbers as HIDDENxROWSxEXPERTSxTOP_K. For argparse."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        hidden, rows, experts, top_k = map(int, text.split("x"))
    except ValueError:
        names = ", ".join(SHAPES)
        message = f"{text}: one of {names}, or numbers as in 4096x14336x8x2"
        raise argparse.ArgumentTypeError(message) from None
    if min(hidden, rows, top_k) < 1 or top_k > experts:
        raise argparse.ArgumentTypeError(f"{text}: all must be 1 or more, and TOP_K ≤ EXPERTS")
    return LayerShape(text, hidden, rows, experts, top_k)


class RandomLayer:
    """A layer with random weights, compressed (`experts`) and dense (`gate_up`, `down`).

    experts has one group. gate_up [E, 2I, H] and down [E, H, I] hold centre + residual, rounded
    once, as transformers' experts lay them out.
    """

    def __init__(
        self, shape: LayerShape, codec: str, keep: float, device: torch.device, seed: int
    ) -> None:
        self.shape = shape
        self.generator = torch.Generator(device).manual_seed(seed)
        E, I, H = shape.experts, shape.rows, shape.hidden  # noqa: E741
        new = partial(torch.empty, dtype=DTYPE, device=device)
        self.gate_up, self.down = new(E, 2 * I, H), new(E, H, I)
        center_ID = self._normal(I, shape.expert.columns)
        draw = {"pruned": self._draw_pruned, "low_rank": self._draw_low_rank}[codec]
        residuals = [draw(k, center_ID, keep) for k in range(E)]
        self.group = ExpertGroup(list(range(E)), center_ID, residuals, [])

    def compressed(self, mode: str) -> ResMoE:
        """Our layer."""
        shape, run_by = self.shape, execution_for(mode)
        experts = CompressedExperts(shape.expert, [self.group], PlainActivation("silu"), run_by)
        run_by.prepare(experts)
        return ResMoE(shape.hidden, experts, shape.experts).eval()

    def dense(self, implementation: str) -> nn.Module:
        """Mixtral's experts, which differ from DeepSeek's and Qwen3's in nothing but their name."""
        shape = self.shape
        config = MixtralConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.rows,
            num_local_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = MixtralExperts(config)
        module.gate_up_proj = nn.Parameter(self.gate_up, requires_grad=False)
        module.down_proj = nn.Parameter(self.down, requires_grad=False)
        return module.eval()

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [T, H], experts [T, K], each equally likely, and their weights [T, K]."""
        shape, device = self.shape, self.gate_up.device
        logits_TE = torch.empty(count, shape.experts, device=device)
        weights_TK, index_TK = logits_TE.normal_(generator=self.generator).topk(shape.top_k)
        x_TH = torch.empty(count, shape.hidden, dtype=DTYPE, device=device)
        return x_TH.normal_(generator=self.generator), index_TK, weights_TK.softmax(-1)

    def bytes_read(self, index_TK: Tensor) -> tuple[int, int]:
        """What the experts of some tokens make it necessary to read: dense, and compressed."""
        active = index_TK.unique().tolist()
        compressed = sum(self.group.residuals[k].nbytes for k in active)
        return len(active) * self.shape.expert_bytes, self.group.center.nbytes + compressed

    def exact(self, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The output [T, H] by float32 products with the dense weights."""
        out_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        for k in index_TK.unique().tolist():
            token_n, place_n = (index_TK == k).nonzero(as_tuple=True)
            gate_up_nC = x_TH[token_n].float() @ self.gate_up[k].float().T
            gate_nI, up_nI = gate_up_nC.chunk(2, -1)
            y_nH = (F.silu(gate_nI) * up_nI) @ self.down[k].float().T
            out_TH.index_add_(0, token_n, y_nH * weights_TK[token_n, place_n, None])
        return out_TH

    def _draw_pruned(self, expert: int, center_ID: Tensor, keep: float) -> EncodedResidual:
        parts, columns = [], center_ID.shape[1]
        for first, center_SD in self._blocks(center_ID):
            chance_SD = torch.empty(center_SD.shape, device=center_SD.device)
            mask_SD = chance_SD.uniform_(generator=self.generator) < keep
            counts_S = mask_SD.sum(1)
            values = self._normal(int(counts_S.sum()))
            offsets = F.pad(counts_S.cumsum(0), (1, 0)).int()
            tensors = {"bitmap": pack_bitmap(mask_SD), "values": values, "row_offsets": offsets}
            parts.append(PrunedResidual(columns, tensors))
            residual_SD = torch.zeros_like(center_SD).masked_scatter_(mask_SD, values)
            self._keep_dense(expert, first, residual_SD.add_(center_SD))
        return PrunedResidual.join_rows(parts)

    def _draw_low_rank(self, expert: int, center_ID: Tensor, keep: float) -> EncodedResidual:
        rows, columns = center_ID.shape
        rank = min(rows, columns) if keep == 1 else rank_for(rows, columns, keep)
        # So that the entries of the product have the centre's spread.
        scale = (_STD * math.sqrt(rank)) ** -0.5
        left, right = self._normal(rows, rank) * scale, self._normal(rank, columns) * scale
        for first, center_SD in self._blocks(center_ID):
            left_Sr = left[first : first + len(center_SD)]
            self._keep_dense(expert, first, torch.addmm(center_SD, left_Sr, right))
        return LowRankResidual(columns, {"left": left, "right": right})

    def _blocks(self, center_ID: Tensor) -> list[tuple[int, Tensor]]:
        """First row and rows, a few at a time: what is drawn takes several times their memory."""
        step = max(1, _BLOCK_ENTRIES // center_ID.shape[1])
        return [(i, center_ID[i : i + step]) for i in range(0, len(center_ID), step)]

    def _keep_dense(self, expert: int, first: int, dense_SD: Tensor) -> None:
        I, rows = self.shape.rows, slice(first, first + len(dense_SD))  # noqa: E741
        gate_SH, up_SH, down_SH = dense_SD.chunk(3, 1)
        self.gate_up[expert, :I][rows] = gate_SH
        self.gate_up[expert, I:][rows] = up_SH
        self.down[expert, :, rows] = down_SH.T

    def _normal(self, *shape: int) -> Tensor:
        values = torch.empty(shape, dtype=DTYPE, device=self.gate_up.device)
        return values.normal_(std=_STD, generator=self.generator)
