"""The MoE layer: DeepSpeed's `MoE` with compressed experts, dropless dispatch and TP reduction.

Two ways to call it. In a transformers model it stands in for the `experts` module and takes the
model's own routing; alone in a DeepSpeed model it routes with DeepSpeed's gate.

Legend: T tokens, K experts per token, E experts, R received copies, H hidden, B batch, S sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed.comm as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from torch import Tensor, nn

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.families.activations import PlainActivation
from resmoe_dist.parallel.dispatcher import NO_EXPERT, Dispatcher
from resmoe_dist.parallel.topology import SINGLE_PROCESS, Topology
from resmoe_dist.runtime.execution import Execution
from resmoe_dist.runtime.experts import CompressedExperts
from resmoe_dist.runtime.planning import execution_for


class _RoutedExperts(MOELayer):
    """DeepSpeed's MOELayer with a dropless exchange and a reduction over tensor parallelism."""

    def __init__(
        self,
        gate: TopKGate | None,
        experts: CompressedExperts,
        num_experts: int,
        topology: Topology,
        ep_group_name: str,
    ) -> None:
        super().__init__(gate, experts, ep_group_name, topology.ep, num_experts // topology.ep)
        self.topology = topology
        self.dispatcher = Dispatcher(num_experts, topology)

    def _set_ep_group(self, ep_group: Any) -> None:
        self.ep_group = ep_group
        if self.gate is not None and self.gate.ep_group is None:
            self.gate._set_ep_group(ep_group)

    def route(self, x_TH: Tensor, used_token_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """DeepSpeed's gate as (top_k_index [T, K], top_k_weights [T, K])."""
        self.l_aux, combine_TEC, _, self.exp_counts = self.gate(x_TH, used_token_T)
        weights_TK, index_TK = combine_TEC.sum(-1).topk(self.gate.k, dim=-1)
        # A copy over an expert's capacity has weight zero, and goes nowhere.
        return index_TK.masked_fill(weights_TK == 0, NO_EXPERT), weights_TK

    def run(self, x_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
        """The distributed forward of one MoE layer: out_TH, the same on all ranks of a TP group."""
        # 1. Tokens to the ranks that own their experts.
        tokens, metadata = self.dispatcher.dispatch(x_TH, top_k_index_TK, top_k_weights_TK)
        # 2. Local experts on this rank's rows of them, weighted and added up over the experts of a
        #    token that are here: a partial sum over intermediate neurons.
        y_RH = self.experts(tokens)
        # 3. Sums home, and added up over the ranks that had some of a token's experts.
        out_TH = self.dispatcher.combine(y_RH, metadata)
        # 4. Partial sums added up over the TP group. Everything after 2 is linear, so this may come
        #    last, where it moves T rows.
        if self.topology.tp_group is not None:
            dist.all_reduce(out_TH, group=self.topology.tp_group)
        return out_TH


class ResMoE(MoE):
    """A DeepSpeed MoE layer whose experts are stored as a centre and residuals (papers 000, 001).

    hidden_size: H. experts: what this rank owns of the layer. topology: the grid it was loaded for;
    its process groups are DeepSpeed's, named by `expert_group_name` as in any DeepSpeed MoE.
    own_gate: keep DeepSpeed's `TopKGate` (`k`, and `gate_options` as `deepspeed.moe.layer.MoE`
    takes them) for calls without routing. Inference only.
    """

    def __init__(
        self,
        hidden_size: int,
        experts: CompressedExperts,
        num_experts: int,
        topology: Topology = SINGLE_PROCESS,
        *,
        own_gate: bool = False,
        k: int = 1,
        **gate_options: Any,
    ) -> None:
        super().__init__(
            hidden_size,
            nn.Identity(),
            num_experts,
            topology.ep,
            k,
            enable_expert_tensor_parallelism=topology.tp > 1,
            **gate_options,
        )
        gate = self.deepspeed_moe.gate if own_gate else None
        self.deepspeed_moe = _RoutedExperts(
            gate, experts, num_experts, topology, self.expert_group_name
        )
        if topology.ep_group is not None or topology.tp_group is not None:
            self.set_deepspeed_parallelism()

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | Path,
        layer: int,
        topology: Topology = SINGLE_PROCESS,
        *,
        activation: str = "silu",
        execution: Execution | None = None,
        k: int = 1,
        **gate_options: Any,
    ) -> ResMoE:
        """Layer number `layer` (among the MoE layers) of a compressed checkpoint, with a gate.

        execution: how C + R is computed, `auto` by default. The gate's weight is
        `deepspeed_moe.gate.wg.weight` [E, H], for the caller to fill.
        """
        checkpoint = CompressedCheckpoint(Path(folder))
        entry = checkpoint.index.layers[layer]
        experts = CompressedExperts.load(
            checkpoint,
            entry,
            topology,
            PlainActivation(activation),
            execution or execution_for(),
        )
        return cls(
            entry.hidden, experts, entry.num_experts, topology, own_gate=True, k=k, **gate_options
        )

    @property
    def experts(self) -> CompressedExperts:
        """This rank's experts."""
        return self.deepspeed_moe.experts

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        *,
        used_token: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """With routing, as transformers calls its experts: output [T, H].

        hidden_states [T, H], top_k_index [T, K] (NO_EXPERT drops a copy), top_k_weights [T, K].

        Without, as DeepSpeed calls an MoE layer: hidden_states [B, S, H] -> (output of the same
        shape, l_aux, exp_counts [E]), routed by DeepSpeed's gate.
        """
        if top_k_index is not None:
            return self.deepspeed_moe.run(hidden_states, top_k_index, top_k_weights)
        if self.deepspeed_moe.gate is None:
            raise ValueError("this layer has no gate of its own: call it with routing")
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self.deepspeed_moe.route(x_TH, used_token)
        out_TH = self.deepspeed_moe.run(x_TH, *routing)
        moe = self.deepspeed_moe
        return out_TH.view_as(hidden_states), moe.l_aux, moe.exp_counts


class SwitchResMoE(ResMoE):
    """`ResMoE` behind Switch Transformers' seam, which passes a one-hot mask, not an index."""

    def forward(self, hidden_states: Tensor, selected: Tensor, routing_weights: Tensor) -> Tensor:
        """hidden_states [T, H], selected [T, 1, E] (all zero: over capacity), weights [T, 1]."""
        kept_T1, index_T1 = selected.max(-1)
        index_T1 = index_T1.masked_fill(kept_T1 == 0, NO_EXPERT)
        return super().forward(hidden_states, index_T1, routing_weights)
