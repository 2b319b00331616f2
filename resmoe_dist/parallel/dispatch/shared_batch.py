"""`shared_batch`: a lane of whole replicas. Every rank has all tokens, so nothing has to be sent.

Each rank runs its experts, and its rows of them, on the tokens that are routed to them. One sum
over the ranks of the lane gives the output: one collective per layer for few tokens, two for many.
Several replicas hold the same experts, so each runs its share of them.
"""

from __future__ import annotations

from torch import Tensor

from resmoe_dist.parallel.collectives import sum_over
from resmoe_dist.parallel.dispatch.base import Dispatcher
from resmoe_dist.parallel.topology import Topology
from resmoe_dist.routing import NO_EXPERT, RoutedTokens


class SharedBatchDispatcher(Dispatcher):
    """See the module's docstring. The lane must be one replica or several."""

    name = "shared_batch"

    def __init__(self, num_experts: int, topology: Topology) -> None:
        assert topology.replica_lanes == 1, "a replica of several lanes has several batches"
        super().__init__(num_experts, topology)

    def dispatch(
        self, x_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
    ) -> tuple[RoutedTokens, None]:
        replicas = self.topology.lane_replicas
        if replicas > 1:
            # Of neighbouring experts, so that the ranks of an expert-parallel position share them.
            elsewhere_TK = top_k_index_TK % replicas != self.topology.dp_rank % replicas
            top_k_index_TK = top_k_index_TK.masked_fill(elsewhere_TK, NO_EXPERT)
        return self.routed_to_local(x_TH, top_k_index_TK, top_k_weights_TK), None

    def combine(self, y_RH: Tensor, metadata: None) -> Tensor:
        group = self.topology.lane_group
        return y_RH if group is None else sum_over(y_RH, group)
