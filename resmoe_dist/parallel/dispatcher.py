"""Tokens to the ranks that own their experts, and back: all-to-all with exact sizes, no padding.

Six stages, three each way: preprocess, exchange, permute; (experts); unpermute, exchange,
postprocess. combine ∘ dispatch with unit weights and identity experts sums a token's K copies.

Legend: T tokens, K experts per token, E experts, L local experts, H hidden, N = copies sent
(T·K less those routed nowhere), R copies received.
"""

from __future__ import annotations

from dataclasses import dataclass

import deepspeed.comm as dist
import torch
from torch import Tensor

from resmoe_dist.parallel.topology import Topology

# A copy with this expert number goes nowhere and adds nothing (a router that drops tokens).
NO_EXPERT = -1


@dataclass(frozen=True, kw_only=True)
class DispatchMetadata:
    """What `combine` needs to undo a `dispatch`.

    slots_N: position token·K + k of each sent copy, in sending order (by expert). order_R: received
    copies in the order of local experts. send_sizes, receive_sizes: copies to and from each EP
    rank. tokens_per_expert: received copies of each local expert (the layout of the output).
    """

    slots_N: Tensor
    order_R: Tensor
    send_sizes: list[int]
    receive_sizes: list[int]
    tokens_per_expert: list[int]
    num_tokens: int
    top_k: int


class Dispatcher:
    """Moves tokens over the expert-parallel group of a topology."""

    def __init__(self, num_experts: int, topology: Topology) -> None:
        self.num_experts = num_experts
        self.topology = topology
        self.num_local_experts = num_experts // topology.ep

    def dispatch(self, x_TH: Tensor, top_k_index_TK: Tensor) -> tuple[Tensor, DispatchMetadata]:
        """Send each token to its experts; returns x_RH sorted by local expert, and the way back.

        Collective over the EP group; a rank with no tokens takes part all the same.
        """
        num_tokens, top_k = top_k_index_TK.shape
        # 1. preprocess: copies sorted by expert, hence by destination rank.
        expert_of_slot = top_k_index_TK.flatten()
        slots_N = expert_of_slot.argsort(stable=True)
        counts_E = torch.bincount(
            expert_of_slot - NO_EXPERT, minlength=self.num_experts - NO_EXPERT
        )
        slots_N = slots_N[int(counts_E[0]) :]
        counts_E = counts_E[1:]
        x_NH = x_TH[slots_N // top_k]
        # 2. exchange: how many copies first, then the copies.
        counts_PL = self._exchange_counts(counts_E)
        send_sizes = counts_E.view(self.topology.ep, -1).sum(1).tolist()
        receive_sizes = counts_PL.sum(1).tolist()
        received_RH = self._exchange(x_NH, receive_sizes, send_sizes)
        # 3. permute: from (source rank, expert) to expert order.
        local_expert_R = torch.arange(self.num_local_experts, device=x_TH.device).repeat(
            self.topology.ep
        )
        order_R = local_expert_R.repeat_interleave(counts_PL.flatten()).argsort(stable=True)
        metadata = DispatchMetadata(
            slots_N=slots_N,
            order_R=order_R,
            send_sizes=send_sizes,
            receive_sizes=receive_sizes,
            tokens_per_expert=counts_PL.sum(0).tolist(),
            num_tokens=num_tokens,
            top_k=top_k,
        )
        return received_RH[order_R], metadata

    def combine(self, y_RH: Tensor, top_k_weights_TK: Tensor, metadata: DispatchMetadata) -> Tensor:
        """Bring the experts' outputs home and add them up, weighted: out_TH in y's dtype.

        The sum over K is taken in float32, in the order of k: it does not depend on the grid.
        """
        # 4. unpermute: back to (source rank, expert).
        received_RH = torch.empty_like(y_RH)
        received_RH[metadata.order_R] = y_RH
        # 5. exchange.
        y_NH = self._exchange(received_RH, metadata.send_sizes, metadata.receive_sizes)
        # 6. postprocess: every copy to its token's slot; slots routed nowhere stay zero.
        T, K = metadata.num_tokens, metadata.top_k
        y_SH = torch.zeros(T * K, y_RH.shape[1], dtype=torch.float32, device=y_RH.device)
        y_SH[metadata.slots_N] = y_NH.float()
        weighted = y_SH.view(T, K, y_RH.shape[1]) * top_k_weights_TK.float().unsqueeze(-1)
        return weighted.sum(1).to(y_RH.dtype)

    def _exchange_counts(self, counts_E: Tensor) -> Tensor:
        """Copies that each EP rank (P) sends to each local expert: [P, L]."""
        if self.topology.ep_group is None:
            return counts_E.view(1, -1)
        counts_PL = torch.empty_like(counts_E)
        dist.all_to_all_single(counts_PL, counts_E, group=self.topology.ep_group)
        return counts_PL.view(self.topology.ep, -1)

    def _exchange(self, rows: Tensor, receive_sizes: list[int], send_sizes: list[int]) -> Tensor:
        """All-to-all-v of rows [·, H] over the EP group."""
        if self.topology.ep_group is None:
            return rows
        received = rows.new_empty(sum(receive_sizes), rows.shape[1])
        dist.all_to_all_single(
            received,
            rows.contiguous(),
            output_split_sizes=receive_sizes,
            input_split_sizes=send_sizes,
            group=self.topology.ep_group,
        )
        return received
