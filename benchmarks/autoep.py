"""DeepSpeed AutoEP on the ranks of a launch: it replaces the MoE blocks of a transformers model.

DeepSpeed's engine applies AutoEP for training. Here its layers are built by themselves, for
inference: the forward pass is the same. `AutoEP.replace_moe_layers` is not used, because that of
DeepSpeed 0.19.8 fails with the output recorders of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import AutoEPConfig
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.ranks import rank, world_size
from resmoe_dist.testing.random_layer import RandomLayer

# How AutoEP multiplies with its experts: `use_grouped_mm`.
EXPERTS = {"loop": False, "grouped_mm": True}


def use_autoep(model: Any, experts: str) -> Any:
    """Replace the MoE blocks of a Mixtral by AutoEP's over all ranks; returns the model.

    experts: one of EXPERTS. Each rank keeps a copy of its own experts.
    """
    ranks = world_size()
    config = AutoEPConfig(
        enabled=True, autoep_size=ranks, preset_model="mixtral", use_grouped_mm=EXPERTS[experts]
    )
    for spec in AutoEP(model, config).ep_parser():
        source = model.get_submodule(spec.moe_module_name)
        made = AutoEPMoELayer(spec, source, ranks, rank(), config).eval()
        # Not `set_deepspeed_parallelism`: it would arrange the group for the grid's TP size.
        made.ep_group = torch.distributed.group.WORLD
        model.set_submodule(spec.moe_module_name, made)
    return model


class _PreciseGate(nn.Module):
    """Logits in float32, as DeepSpeed's other gate computes them."""

    def __init__(self, weight_EH: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_EH, requires_grad=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        return F.linear(x_TH.float(), self.weight)


def autoep_layer(
    layer: RandomLayer, router_EH: Tensor, experts: str
) -> tuple[Callable[[Tensor], Tensor], Any]:
    """One AutoEP layer with the weights of a random layer: tokens [T, H] -> [T, H]; its module."""
    shape = layer.shape
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.rows,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        num_hidden_layers=1,
        vocab_size=8,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    block = model.model.layers[0].mlp
    block.gate.weight = nn.Parameter(router_EH, requires_grad=False)
    block.experts.gate_up_proj = nn.Parameter(layer.gate_up, requires_grad=False)
    block.experts.down_proj = nn.Parameter(layer.down, requires_grad=False)
    made = use_autoep(model, experts).model.layers[0].mlp
    made.router.gate = _PreciseGate(router_EH)
    return lambda x_TH: made(x_TH.unsqueeze(0)).squeeze(0), made
