"""A MoE layer of a real model's shape with random weights, compressed and dense.

Legend: T tokens, K experts per token, E experts, I rows, H hidden, D columns, S rows of a block,
n copies of one expert, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from resmoe_dist.codecs import (
    CodecSpec,
    DenseMatrix,
    EncodedMatrix,
    LowRankConfig,
    LowRankMatrix,
    PrunedConfig,
    PrunedMatrix,
    QuantizedConfig,
)
from resmoe_dist.design_matrix import ExpertShape
from resmoe_dist.families.activations import PlainActivation
from resmoe_dist.kernels import LayerWeights, backend_for
from resmoe_dist.runtime.experts import CompressedExperts
from resmoe_dist.runtime.layer import ResMoE
from resmoe_dist.runtime.planning import execution_for
from resmoe_dist.testing.random_quantized import random_quantized

DTYPE = torch.bfloat16
# Standard deviation of the weights of a centre and of a pruned residual.
_STD = 0.02
# Entries that are drawn at a time. Drawing takes several times their memory.
BLOCK_ENTRIES = 1 << 24


@dataclass(frozen=True)
class LayerShape:
    """A layer of `experts` gated experts, `top_k` of them for each token."""

    name: str
    hidden: int
    rows: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return self.name

    @property
    def expert(self) -> ExpertShape:
        """Shape of each expert."""
        return ExpertShape(self.rows, self.hidden)

    @property
    def expert_bytes(self) -> int:
        """Bytes of each dense expert."""
        return self.expert.entries * DTYPE.itemsize


# Each half is the shard of one of two tensor-parallel ranks.
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


def parse_shape(text: str) -> LayerShape:
    """A shape by its name in SHAPES, or as HIDDENxROWSxEXPERTSxTOP_K. Raises ValueError."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        hidden, rows, experts, top_k = map(int, text.split("x"))
    except ValueError:
        names = ", ".join(SHAPES)
        raise ValueError(f"{text}: choose {names}, or give sizes: 4096x14336x8x2") from None
    if min(hidden, rows, top_k) < 1 or top_k > experts:
        raise ValueError(f"{text}: all sizes must be 1 or more, and TOP_K ≤ EXPERTS")
    return LayerShape(text, hidden, rows, experts, top_k)


class RandomLayer:
    """A random layer in bfloat16: `weights`, and the same dense as `gate_up` and `down`.

    codec: of the residuals, `pruned`, `low_rank` or `quantized`. All experts share one centre. It
    is dense; beside quantised residuals it is quantised as `center` says, or absent. gate_up
    [E, 2I, H] and down [E, H, I], in the layout of transformers' experts, hold centre + residual,
    rounded once. No two tensors share memory.
    """

    def __init__(
        self,
        shape: LayerShape,
        codec: CodecSpec,
        device: torch.device,
        seed: int = 0,
        block_entries: int = BLOCK_ENTRIES,
        center: CodecSpec | None = None,
    ) -> None:
        self.shape, self.codec, self.center = shape, codec, center
        self.generator = torch.Generator(device).manual_seed(seed)
        self._block_entries = block_entries
        E, I, H = shape.experts, shape.rows, shape.hidden  # noqa: E741
        new = partial(torch.empty, dtype=DTYPE, device=device)
        self.gate_up, self.down = new(E, 2 * I, H), new(E, H, I)
        if codec.name == "quantized":
            self.weights = self._draw_quantized()
            self._restore_dense()
            return
        center_ID = self._normal(I, shape.expert.columns)
        draw = {"pruned": self._draw_pruned, "low_rank": self._draw_low_rank}[codec.name]
        residuals = tuple(draw(k, center_ID) for k in range(E))
        self.weights = LayerWeights(
            shape.expert,
            residuals,
            centers=(DenseMatrix.of(center_ID),),
            center_of=(0,) * E,
            activation=PlainActivation("silu"),
        )

    def compressed(self, mode: str) -> ResMoE:
        """The compressed layer on one rank, run by execution `mode`."""
        experts = CompressedExperts(self.weights, execution_for(mode))
        experts.prepare()
        return ResMoE(self.shape.hidden, experts, self.shape.experts).eval()

    def dense(self, implementation: str) -> nn.Module:
        """transformers' Mixtral experts; DeepSeek's and Qwen3's compute the same."""
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
        """New hidden states [T, H], uniform routing [T, K], and its weights [T, K]."""
        shape, device = self.shape, self.gate_up.device
        logits_TE = torch.empty(count, shape.experts, device=device)
        weights_TK, index_TK = logits_TE.normal_(generator=self.generator).topk(shape.top_k)
        x_TH = torch.empty(count, shape.hidden, dtype=DTYPE, device=device)
        return x_TH.normal_(generator=self.generator), index_TK, weights_TK.softmax(-1)

    def exact(self, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The output [T, H] by float32 products with the dense weights."""
        out_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        for k in index_TK.unique().tolist():
            token_n, place_n = (index_TK == k).nonzero(as_tuple=True)
            gate_nI, up_nI = (x_TH[token_n].float() @ self.gate_up[k].float().T).chunk(2, -1)
            y_nH = (F.silu(gate_nI) * up_nI) @ self.down[k].float().T
            out_TH.index_add_(0, token_n, y_nH * weights_TK[token_n, place_n, None])
        return out_TH

    def bytes_read(self, index_TK: Tensor) -> dict[str, int]:
        """Bytes that some tokens' experts have to read at least once: `dense`, `compressed`.

        Activations are not counted.
        """
        active = index_TK.unique().tolist()
        residuals = sum(self.weights.residuals[k].nbytes for k in active)
        return {
            "dense": len(active) * self.shape.expert_bytes,
            "compressed": sum(center.nbytes for center in self.weights.centers) + residuals,
        }

    @property
    def resident_bytes(self) -> int:
        """Bytes of the live tensors of the compressed layer."""
        return sum(m.nbytes for m in (*self.weights.centers, *self.weights.residuals))

    @property
    def stored_bytes(self) -> int:
        """Bytes by the codec's formula."""
        shape, size = self.shape, (self.shape.rows, self.shape.expert.columns)
        expert = self.codec.codec.stored_bytes(*size, self.codec.config, DTYPE.itemsize)
        center = shape.expert_bytes
        if self.center is not None:
            center = self.center.codec.stored_bytes(*size, self.center.config, DTYPE.itemsize)
        return center * len(self.weights.centers) + shape.experts * expert

    def _draw_quantized(self) -> LayerWeights:
        shape = self.shape
        specs = [self.codec] * shape.experts + ([self.center] if self.center else [])
        drawn = []
        for spec in specs:
            assert isinstance(spec.config, QuantizedConfig)
            drawn.append(random_quantized(shape.expert, spec.config, DTYPE, _STD, self.generator))
        return LayerWeights(
            shape.expert,
            tuple(drawn[: shape.experts]),
            centers=tuple(drawn[shape.experts :]),
            center_of=(0 if self.center else -1,) * shape.experts,
            activation=PlainActivation("silu"),
        )

    def _restore_dense(self) -> None:
        backend, columns = backend_for(self.weights), self.shape.expert.columns
        step = max(1, self._block_entries // columns)
        for expert in range(self.shape.experts):
            for first in range(0, self.shape.rows, step):
                rows = min(step, self.shape.rows - first)
                dense_SD = torch.empty(rows, columns, dtype=DTYPE, device=self.gate_up.device)
                backend.restore(expert, dense_SD, first)
                self._set_dense(expert, first, dense_SD)

    def _draw_pruned(self, expert: int, center_ID: Tensor) -> EncodedMatrix:
        parts = []
        config = self.codec.config
        assert isinstance(config, PrunedConfig)
        for first, center_SD in self._blocks(center_ID):
            chance_SD = torch.empty(center_SD.shape, device=center_SD.device)
            mask_SD = chance_SD.uniform_(generator=self.generator) < config.keep
            values = self._normal(int(mask_SD.sum()))
            residual_SD = torch.zeros_like(center_SD).masked_scatter_(mask_SD, values)
            parts.append(PrunedMatrix.encode(residual_SD, config, DTYPE, mask_SD))
            self._set_dense(expert, first, residual_SD.add_(center_SD))
        return PrunedMatrix.join_rows(parts)

    def _draw_low_rank(self, expert: int, center_ID: Tensor) -> EncodedMatrix:
        rows, columns = center_ID.shape
        assert isinstance(self.codec.config, LowRankConfig)
        rank = self.codec.config.rank_of(rows, columns)
        # The entries of the product then have the standard deviation of the centre.
        scale = (_STD * math.sqrt(rank)) ** -0.5
        left_Ir, right_rD = self._normal(rows, rank) * scale, self._normal(rank, columns) * scale
        for first, center_SD in self._blocks(center_ID):
            left_Sr = left_Ir[first : first + len(center_SD)]
            self._set_dense(expert, first, torch.addmm(center_SD, left_Sr, right_rD))
        return LowRankMatrix((rows, columns), {"left": left_Ir, "right": right_rD}, DTYPE)

    def _blocks(self, center_ID: Tensor) -> list[tuple[int, Tensor]]:
        """Blocks of rows, with the number of their first row."""
        step = max(1, self._block_entries // center_ID.shape[1])
        return [(i, center_ID[i : i + step]) for i in range(0, len(center_ID), step)]

    def _set_dense(self, expert: int, first: int, dense_SD: Tensor) -> None:
        I, rows = self.shape.rows, slice(first, first + len(dense_SD))  # noqa: E741
        gate_SH, up_SH, down_SH = dense_SD.chunk(3, 1)
        self.gate_up[expert, :I][rows] = gate_SH
        self.gate_up[expert, I:][rows] = up_SH
        self.down[expert, :, rows] = down_SH.T

    def _normal(self, *shape: int) -> Tensor:
        values = torch.empty(shape, dtype=DTYPE, device=self.gate_up.device)
        return values.normal_(std=_STD, generator=self.generator)
