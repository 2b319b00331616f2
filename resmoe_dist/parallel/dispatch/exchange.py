"""`exchange`: many tokens. All-to-all with exact sizes, no padding, and nothing dropped.

The ranks of a lane divide its tokens among them. Each sends its tokens once to every rank that owns
some of their experts, with their routing in the same message, and gets the sums back from all
tensor-parallel ranks at once. Four collectives: sizes, tokens, sums, and a gather over the lane.

Legend: T tokens of this lane, M tokens of this rank's share, K experts per token, P ranks of the
replica, S rows sent (a token to a rank), R received rows, H hidden, V sums per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resmoe_dist.design_matrix import row_range
from resmoe_dist.kernels.sums import add_up
from resmoe_dist.parallel.collectives import exchange, exchange_ragged, gather
from resmoe_dist.parallel.dispatch.base import Dispatcher
from resmoe_dist.parallel.dispatch.messages import pack, unpack
from resmoe_dist.routing import NO_EXPERT, RoutedTokens


@dataclass(frozen=True, kw_only=True)
class ExchangeMetadata:
    """What `combine` needs to undo a `dispatch`.

    tokens: of this lane (T). sent_PM: whether a token of this rank's share went to a rank.
    sums_per_token: most ranks that a token can go to (V). send_sizes, receive_sizes: rows to and
    from each rank.
    """

    tokens: int
    sent_PM: Tensor
    sums_per_token: int
    send_sizes: list[int]
    receive_sizes: list[int]


class ExchangeDispatcher(Dispatcher):
    """See the module's docstring."""

    name = "exchange"

    def dispatch(
        self, x_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
    ) -> tuple[RoutedTokens, ExchangeMetadata]:
        place = self.topology
        assert place.replica_group is not None
        (T, H), K = x_TH.shape, top_k_index_TK.shape[1]
        # 1. This rank's share of the lane's tokens, and the ranks that each of them goes to.
        share = slice(*row_range(T, place.lane_rank, place.lane_size))
        x_MH, index_MK, weights_MK = (t[share] for t in (x_TH, top_k_index_TK, top_k_weights_TK))
        position_MK = index_MK.div(self.num_local_experts, rounding_mode="floor")
        # Dropped copies go to an extra position, which is cut off.
        position_MK = position_MK.masked_fill(index_MK == NO_EXPERT, place.ep).long()
        wanted_ME = torch.zeros(len(x_MH), place.ep + 1, dtype=torch.bool, device=x_TH.device)
        wanted_ME.scatter_(1, position_MK, True)
        sent_PM = wanted_ME[:, : place.ep].T.repeat_interleave(place.tp, 0)
        # 2. Sizes, then the tokens with their routing. Exact sizes must be known on the host.
        sizes_P = sent_PM.sum(1)
        theirs_P = exchange(sizes_P, place.replica_group)
        metadata = ExchangeMetadata(
            tokens=T,
            sent_PM=sent_PM,
            sums_per_token=min(K, place.ep) * place.tp,
            send_sizes=sizes_P.tolist(),
            receive_sizes=theirs_P.tolist(),
        )
        token_S = sent_PM.nonzero()[:, 1]
        rows_RB = exchange_ragged(
            pack(x_MH, index_MK, weights_MK)[token_S],
            metadata.send_sizes,
            metadata.receive_sizes,
            place.replica_group,
        )
        # 3. The copies for this rank's experts.
        return self.routed_to_local(*unpack(rows_RB, H, x_TH.dtype, K)), metadata

    def combine(self, y_RH: Tensor, metadata: ExchangeMetadata) -> Tensor:
        place, sent_PM = self.topology, metadata.sent_PM
        assert place.replica_group is not None
        # 4. Sums back to the ranks that sent the tokens.
        y_SH = exchange_ragged(
            y_RH, metadata.receive_sizes, metadata.send_sizes, place.replica_group
        )
        # 5. Each sum gets a place among its token's sums; places without one stay zero.
        M, V = sent_PM.shape[1], metadata.sums_per_token
        y_VMH = y_RH.new_zeros(V, M, y_RH.shape[1])
        place_PM = sent_PM.cumsum(0) - 1
        token_S = sent_PM.nonzero()[:, 1]
        y_VMH[place_PM[sent_PM], token_S] = y_SH
        out_MH = add_up(y_VMH)
        # 6. The shares of the lane. They differ by one token at most.
        if place.lane_group is None:
            return out_MH
        return _gather_shares(out_MH, metadata.tokens, place.lane_size, place.lane_group)


def _gather_shares(
    out_MH: Tensor, tokens: int, lane_size: int, group: torch.distributed.ProcessGroup
) -> Tensor:
    """[T, H] from the shares of all ranks of a lane."""
    largest = -(-tokens // lane_size)
    padded = F.pad(out_MH, (0, 0, 0, largest - len(out_MH)))
    shares = gather(padded, group).view(lane_size, largest, out_MH.shape[1])
    sizes = [
        stop - start for start, stop in (row_range(tokens, i, lane_size) for i in range(lane_size))
    ]
    return torch.cat([part[:size] for part, size in zip(shares, sizes, strict=True)])
