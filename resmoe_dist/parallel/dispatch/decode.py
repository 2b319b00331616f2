"""`decode`: few tokens on several lanes. Two collectives per layer, with sizes fixed in advance.

Such a step is limited by the number of collectives, not by bytes:

1. Every rank gathers the tokens of all lanes of its replica, and their routing in the same message.
2. Every rank sends its sums for a lane's tokens to all ranks of that lane, which add them up. This
   brings home experts and tensor-parallel partial sums at once.

All shapes follow from the capacity; nothing waits for the device.

Legend: T tokens of this lane, C capacity (tokens of the largest lane), G lanes of the replica, K
experts per token, H hidden, P ranks of the replica.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from resmoe_dist.kernels.sums import add_up
from resmoe_dist.parallel.collectives import exchange, gather
from resmoe_dist.parallel.dispatch.base import Dispatcher
from resmoe_dist.parallel.dispatch.messages import pack, unpack
from resmoe_dist.routing import RoutedTokens


@dataclass(frozen=True)
class DecodeMetadata:
    """tokens: of this lane (T). capacity: tokens of the largest lane (C)."""

    tokens: int
    capacity: int


class DecodeDispatcher(Dispatcher):
    """See the module's docstring.

    capacity: at least the tokens of any lane of the replica; the same on all ranks. Set before
    every `dispatch` for which it changes.
    """

    name = "decode"
    capacity: int = 0

    def dispatch(
        self, x_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
    ) -> tuple[RoutedTokens, DecodeMetadata]:
        (T, H), K = x_TH.shape, top_k_index_TK.shape[1]
        assert self.capacity >= T, f"{T} tokens, capacity {self.capacity}"
        rows_CB = pack(x_TH, top_k_index_TK, top_k_weights_TK, rows=self.capacity)
        peers = self.topology.peer_group
        assert peers is not None, "one lane needs no dispatch"
        rows_RB = gather(rows_CB, peers)
        routed = self.routed_to_local(*unpack(rows_RB, H, x_TH.dtype, K))
        return routed, DecodeMetadata(T, self.capacity)

    def combine(self, y_RH: Tensor, metadata: DecodeMetadata) -> Tensor:
        place = self.topology
        assert place.replica_group is not None
        G, C, H = place.replica_lanes, metadata.capacity, y_RH.shape[1]
        # The ranks of a lane are neighbours.
        sent_PCH = y_RH.view(G, 1, C, H).expand(-1, place.lane_size, -1, -1).flatten(0, 1)
        parts_PCH = exchange(sent_PCH, place.replica_group)
        return add_up(parts_PCH)[: metadata.tokens]
