"""Tokens to the ranks that own their experts, and back: all-to-all with exact sizes, no padding.

A token travels once to each rank that owns some of its experts. There its experts' outputs are
weighted and summed, and the sum travels back. Six stages, three each way: preprocess, exchange,
sort; (experts); exchange, sort, postprocess. combine ∘ dispatch, with experts that sum up
weight · token, multiplies each token by the sum of its weights.

Legend: T tokens, K experts per token, E experts, L local experts, P ranks of the EP group, H
hidden, M rows sent (a token to a rank), R received rows, N routed copies, S slots of summands.
"""

from __future__ import annotations

from dataclasses import dataclass

import deepspeed.comm as dist
import torch
from torch import Tensor

from resmoe_dist.parallel.topology import Topology
from resmoe_dist.routing import RoutedTokens, expert_offsets


@dataclass(frozen=True, kw_only=True)
class DispatchMetadata:
    """What `combine` needs to undo a `dispatch`.

    sent_PT: whether a token went to a rank. max_ranks_per_token: how many ranks a token can go to.
    send_sizes, receive_sizes: rows to and from each EP rank.
    """

    sent_PT: Tensor
    max_ranks_per_token: int
    send_sizes: list[int]
    receive_sizes: list[int]


class Dispatcher:
    """Moves tokens over the expert-parallel group of a topology."""

    def __init__(self, num_experts: int, topology: Topology) -> None:
        self.num_experts = num_experts
        self.topology = topology
        self.num_local_experts = num_experts // topology.ep

    def dispatch(
        self, x_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
    ) -> tuple[RoutedTokens, DispatchMetadata | None]:
        """Send each token to its experts. Returns what this rank received, and the way back.

        Collective over the EP group; a rank without tokens takes part all the same.
        """
        # 1. Preprocess: copies sorted by expert, hence by destination rank, and by token.
        routed = RoutedTokens.from_routing(x_TH, top_k_index_TK, top_k_weights_TK, self.num_experts)
        if self.topology.ep_group is None:
            return routed, None
        # All-to-all with exact sizes needs them on the host; dropped copies stay behind.
        sent = int(routed.offsets_L[-1])
        expert_N, token_N = routed.expert_N[:sent], routed.token_N[:sent]
        weight_N, counts_E = routed.weight_N[:sent], routed.offsets_L.diff()
        rank_N = expert_N // self.num_local_experts
        sent_PT = torch.zeros(
            self.topology.ep, len(x_TH), dtype=torch.bool, device=x_TH.device
        ).index_put_((rank_N, token_N), torch.tensor(True, device=x_TH.device))
        place_N = (sent_PT.cumsum(1) - 1)[rank_N, token_N]
        # 2. Exchange: sizes first, then the tokens, then their copies.
        counts_PL = counts_E.view(self.topology.ep, -1)
        rows_P1 = sent_PT.sum(1, keepdim=True)
        theirs_PL, theirs_P1 = self._exchange_counts(counts_PL, rows_P1)
        metadata = DispatchMetadata(
            sent_PT=sent_PT,
            max_ranks_per_token=min(top_k_index_TK.shape[1], self.topology.ep),
            send_sizes=rows_P1.flatten().tolist(),
            receive_sizes=theirs_P1.flatten().tolist(),
        )
        token_M = sent_PT.nonzero()[:, 1]
        x_RH = self._exchange(x_TH[token_M], metadata.receive_sizes, metadata.send_sizes)
        copies_N2 = self._exchange(
            torch.stack([place_N.int(), weight_N.view(torch.int32)], 1),
            theirs_PL.sum(1).tolist(),
            counts_PL.sum(1).tolist(),
        )
        # 3. Sort: from (source rank, expert) to expert order.
        first_row_P = theirs_P1.flatten().cumsum(0) - theirs_P1.flatten()
        row_N = copies_N2[:, 0] + first_row_P.repeat_interleave(theirs_PL.sum(1))
        expert_PL = torch.arange(self.num_local_experts, device=x_TH.device).expand_as(theirs_PL)
        expert_N, order_N = (
            expert_PL.flatten().repeat_interleave(theirs_PL.flatten()).sort(stable=True)
        )
        received = RoutedTokens(
            x_RH=x_RH,
            token_N=row_N[order_N],
            weight_N=copies_N2[:, 1].contiguous().view(torch.float32)[order_N],
            offsets_L=expert_offsets(expert_N, self.num_local_experts),
        )
        return received, metadata

    def combine(self, y_RH: Tensor, metadata: DispatchMetadata | None) -> Tensor:
        """Bring the sums of each rank's experts home and add them up: [T, H] in y's dtype.

        The sum over ranks is taken in float32, in the order of the ranks.
        """
        if metadata is None:
            return y_RH
        # 4. Exchange.
        y_MH = self._exchange(y_RH, metadata.send_sizes, metadata.receive_sizes)
        # 5. Sort: each row gets a slot beside its token's other rows.
        sent_PT, max_ranks = metadata.sent_PT, metadata.max_ranks_per_token
        first_slot_T = torch.arange(sent_PT.shape[1], device=sent_PT.device) * max_ranks
        slot_PT = sent_PT.cumsum(0) - 1 + first_slot_T
        slots = sent_PT.shape[1] * max_ranks
        y_SH = torch.zeros(slots, y_RH.shape[1], dtype=torch.float32, device=y_RH.device)
        y_SH[slot_PT[sent_PT]] = y_MH.float()
        # 6. Postprocess: slots without a row are zero.
        return y_SH.view(-1, max_ranks, y_RH.shape[1]).sum(1).to(y_RH.dtype)

    def _exchange_counts(self, counts_PL: Tensor, rows_P1: Tensor) -> tuple[Tensor, Tensor]:
        """Copies for each local expert, and rows, that each EP rank sends here."""
        ours = torch.cat([counts_PL, rows_P1], 1)
        theirs = torch.empty_like(ours)
        dist.all_to_all_single(theirs, ours, group=self.topology.ep_group)
        return theirs[:, :-1], theirs[:, -1:]

    def _exchange(self, rows: Tensor, receive_sizes: list[int], send_sizes: list[int]) -> Tensor:
        """All-to-all-v of rows over the EP group."""
        received = rows.new_empty(sum(receive_sizes), *rows.shape[1:])
        dist.all_to_all_single(
            received,
            rows.contiguous(),
            output_split_sizes=receive_sizes,
            input_split_sizes=send_sizes,
            group=self.topology.ep_group,
        )
        return received
