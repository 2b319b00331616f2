"""Floating-point operations of a forward pass, counted while it runs.

A multiplication and its addition are two operations. Products of matrices and attention scores
count; element-wise work does not. Attention counts all pairs of tokens, also the masked ones.

Legend: R received rows (tokens), H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from resmoe_dist.kernels import Backend
from resmoe_dist.kernels.reference import ReferenceBackend
from resmoe_dist.routing import RoutedTokens
from resmoe_dist.runtime.execution import Execution, Restore
from resmoe_dist.runtime.experts import CompressedExperts

# Tokens of the forward pass that is counted. Restoring an expert is spread over them.
COUNTED_TOKENS = 64


class _SharedInPyTorch(Execution):
    """`shared` by the reference backend: PyTorch does not see into compiled kernels."""

    def run(self, routed: RoutedTokens, backend: Backend) -> Tensor:
        return ReferenceBackend(backend.layer).mlp(routed, share_center=True)


@torch.no_grad()
def flops_per_token(model: PreTrainedModel, sequences: Sequence[list[int]]) -> float:
    """Operations per token of the first tokens of the first sequence.

    Compressed experts are run in two ways, `restore` and `shared`, and the smaller count is
    returned: the runtime has both, and which one is faster differs between machines. Kernels
    multiply the zeros of pruned entries, so these count. Factors count as they are multiplied:
    one after the other, or with each other to restore an expert.
    """
    experts = [module for module in model.modules() if isinstance(module, CompressedExperts)]
    ways: list[Execution] = [Restore(), _SharedInPyTorch()] if experts else [Restore()]
    usual = [module.execution for module in experts]
    ids = torch.tensor([sequences[0][:COUNTED_TOKENS]], device=model.device)
    counts = []
    try:
        for way in ways:
            for module in experts:
                # Dense layers have nothing to share.
                module.execution = Restore() if module.layer.is_dense else way
            counts.append(_count(model, ids))
    finally:
        for module, execution in zip(experts, usual, strict=True):
            module.execution = execution
    return min(counts) / ids.numel()


def _count(model: PreTrainedModel, ids_BS: Tensor) -> int:
    inputs: dict[str, Any] = {"input_ids": ids_BS, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids_BS
    with FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED_BY_TORCH) as counter:
        model(**inputs)
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of the shapes [B, heads, tokens, dims] of an attention."""
    batch, heads, queries, dims = query
    return 2 * batch * heads * queries * key[2] * (dims + value[3])


def _addmm_flops(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    """Of the shapes [n, k] and [k, m] of a product that is added in place."""
    return 2 * left[0] * left[1] * right[1]


_aten = torch.ops.aten
_NOT_COUNTED_BY_TORCH: dict[Any, Any] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten.addmm_: _addmm_flops,
}
