"""The MoE layer: DeepSpeed's `MoE` with compressed experts, dropless dispatch and TP reduction.

Two ways to call it. In a transformers model it replaces the `experts` module and takes the model's
own routing. In a DeepSpeed model it routes with DeepSpeed's gate.

Legend: T tokens, K experts per token, E experts, R received copies, H hidden, B batch, S sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from torch import Tensor, nn

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.families.activations import PlainActivation
from resmoe_dist.families.adapters import ExpertsAdapter, FusedExperts
from resmoe_dist.parallel.dispatch import Dispatcher, dispatcher_for
from resmoe_dist.parallel.topology import SINGLE_PROCESS, Topology
from resmoe_dist.routing import NO_EXPERT
from resmoe_dist.runtime.execution import Execution
from resmoe_dist.runtime.experts import CompressedExperts
from resmoe_dist.runtime.planning import execution_for


class _RoutedExperts(MOELayer):
    """DeepSpeed's MOELayer with our dispatch, which drops nothing and adds up partial sums.

    expert_map_E: the stored expert of each of the router's experts; None if they are the same.
    """

    def __init__(
        self,
        gate: TopKGate | None,
        experts: CompressedExperts,
        dispatcher: Dispatcher,
        ep_group_name: str,
        expert_map: list[int] | None,
    ) -> None:
        ep, local_experts = dispatcher.topology.ep, dispatcher.num_local_experts
        super().__init__(gate, experts, ep_group_name, ep, local_experts)
        self.dispatcher = dispatcher
        expert_map_E = None if expert_map is None else torch.tensor([*expert_map, NO_EXPERT])
        self.register_buffer("expert_map_E", expert_map_E, persistent=False)

    def _set_ep_group(self, ep_group: Any) -> None:
        self.ep_group = ep_group
        if self.gate is not None and self.gate.ep_group is None:
            self.gate._set_ep_group(ep_group)

    def route(self, x_TH: Tensor, used_token_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """DeepSpeed's gate as (top_k_index [T, K], top_k_weights [T, K])."""
        self.l_aux, combine_TEC, _, self.exp_counts = self.gate(x_TH, used_token_T)
        weights_TK, index_TK = combine_TEC.sum(-1).topk(self.gate.k, dim=-1)
        # A copy beyond an expert's capacity has weight zero: drop it.
        return index_TK.masked_fill(weights_TK == 0, NO_EXPERT), weights_TK

    def run(self, x_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
        """The distributed forward of one MoE layer: out_TH, the same on all ranks of a lane."""
        # 1. The stored experts of the router's experts (merged models; NO_EXPERT is index -1).
        if self.expert_map_E is not None:
            top_k_index_TK = self.expert_map_E[top_k_index_TK]
        # 2. Dispatch: tokens to the ranks that own their experts.
        routed, metadata = self.dispatcher.dispatch(x_TH, top_k_index_TK, top_k_weights_TK)
        # 3. Local experts, this rank's rows of them: weighted sums over the experts of each token
        #    that are here, partial over intermediate neurons.
        y_RH = self.experts(routed)
        # 4. Combine: the sums of all expert- and tensor-parallel ranks, added up where their tokens
        #    came from.
        return self.dispatcher.combine(y_RH, metadata)


class ResMoE(MoE):
    """A DeepSpeed MoE layer whose experts are stored as a centre and residuals (papers 000, 001).

    hidden_size: H. experts: what this rank owns of the layer. num_experts: that the router chooses
    among, on all ranks. topology: the grid it was loaded for; its process groups are DeepSpeed's,
    named by `expert_group_name` as in any DeepSpeed MoE. expert_map: which stored expert each of
    the router's experts is; None if they are the same. dispatcher: how tokens travel; None is
    `auto` for a layer by itself. adapter: how the model calls its experts; None: with routing.
    own_gate: keep DeepSpeed's `TopKGate` (`k`, and `gate_options` as `deepspeed.moe.layer.MoE`
    takes them) for calls without routing. Inference only.
    """

    deepspeed_moe: _RoutedExperts

    def __init__(
        self,
        hidden_size: int,
        experts: CompressedExperts,
        num_experts: int,
        topology: Topology = SINGLE_PROCESS,
        *,
        expert_map: list[int] | None = None,
        dispatcher: Dispatcher | None = None,
        adapter: ExpertsAdapter | None = None,
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
        # Fused experts are called with the routing as it is.
        self._adapter = None if isinstance(adapter, FusedExperts) else adapter
        gate = self.deepspeed_moe.gate if own_gate else None
        if dispatcher is None:
            stored = num_experts if expert_map is None else max(expert_map) + 1
            dispatcher = dispatcher_for(stored, topology)
        self.deepspeed_moe = _RoutedExperts(
            gate, experts, dispatcher, self.expert_group_name, expert_map
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
        `deepspeed_moe.gate.wg.weight` [E, H], for the caller to fill. If experts were dropped, it
        has the rows of the others alone, in order.
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
            entry.hidden,
            experts,
            len(entry.kept_experts),
            topology,
            expert_map=entry.kept_map,
            own_gate=True,
            k=k,
            **gate_options,
        )

    @property
    def experts(self) -> CompressedExperts:
        """This rank's experts."""
        return self.deepspeed_moe.experts

    @property
    def dispatcher(self) -> Dispatcher:
        """How its tokens travel."""
        return self.deepspeed_moe.dispatcher

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        *,
        used_token: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """With routing, as a transformers model calls its experts: output [T, H].

        hidden_states [T, H], top_k_index [T, K] (NO_EXPERT drops a copy), top_k_weights [T, K], or
        whatever the family's adapter turns into these.

        Without, as DeepSpeed calls an MoE layer: hidden_states [B, S, H] -> (output of the same
        shape, l_aux, exp_counts [E]), routed by DeepSpeed's gate.
        """
        if self._adapter is not None:
            call = (hidden_states, top_k_index, top_k_weights)
            return self._adapter.call(self.deepspeed_moe.run, *(x for x in call if x is not None))
        if top_k_index is not None and top_k_weights is not None:
            return self.deepspeed_moe.run(hidden_states, top_k_index, top_k_weights)
        if self.deepspeed_moe.gate is None:
            raise ValueError("this layer has no gate; call it with routing")
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self.deepspeed_moe.route(x_TH, used_token)
        out_TH = self.deepspeed_moe.run(x_TH, *routing)
        moe = self.deepspeed_moe
        return out_TH.view_as(hidden_states), moe.l_aux, moe.exp_counts
