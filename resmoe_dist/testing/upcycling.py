"""Turns a dense model into an MoE model, and keeps all its experts in use."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


@torch.no_grad()
def upcycle(dense: PreTrainedModel, moe: PreTrainedModel) -> PreTrainedModel:
    """Copy `dense` into `moe`, its one expert into every expert; routers are initialised anew."""
    source = dense.state_dict()
    for name, target in moe.state_dict().items():
        if name.endswith("gate.e_score_correction_bias"):
            continue
        if name.endswith(("gate.weight", "classifier.weight")):
            target.normal_(std=0.02)  # small, so that tokens spread over all experts
            continue
        value = source[re.sub(r"experts\.expert_\d+", "experts.expert_0", name)]
        fused = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
        target.copy_(value[:1] if fused else value)
    return moe


def choose_first_expert(dense: PreTrainedModel) -> None:
    """Make routers with a selection bias (DeepSeek's) choose only the first expert."""
    for module in dense.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias[1:] = float("-inf")


def balance_by_bias(moe: PreTrainedModel, rate: float = 0.005) -> None:
    """Balance routers with a selection bias during training (arXiv:2408.15664, algorithm 1)."""

    def nudge(router: Any, _inputs: tuple, outputs: tuple) -> None:
        if router.training:
            load = torch.bincount(outputs[2].flatten(), minlength=router.num_experts).float()
            router.e_score_correction_bias += rate * torch.sign(load.mean() - load)

    for module in moe.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.register_forward_hook(nudge)


def imbalance(outputs: ModelOutput, top_k: int) -> Tensor:
    """The load-balancing loss of Switch (arXiv:2101.03961, eq. 4), a mean over layers; least 1.

    transformers pools the layers first, so a layer may ignore experts that other layers use.
    """
    if "router_logits" in outputs:
        layers = outputs.router_logits
    else:
        layers = (*outputs.encoder_router_logits, *outputs.decoder_router_logits)
    losses = []
    for logits in layers:
        probabilities = logits.flatten(0, -2).softmax(-1)  # [T, E]
        experts = probabilities.shape[-1]
        chosen = probabilities.topk(min(top_k, experts)).indices.flatten()
        shares = torch.bincount(chosen, minlength=experts) / len(chosen)
        losses.append(experts * (shares * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()
