"""What every form of dispatch offers, and the form of a single rank.

A form moves the tokens of a lane to the ranks that own their experts, and brings home the sum of
what those ranks computed: over experts, and over the tensor-parallel ranks that hold parts of them.
combine ∘ dispatch, with experts that return weight · token, multiplies each token by the sum of its
weights.

Legend: T tokens of this lane, K experts per token, L local experts, R received rows (tokens), H
hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from resmoe_dist.parallel.topology import Topology
from resmoe_dist.routing import RoutedTokens


class Dispatcher(ABC):
    """Moves the tokens of one MoE layer over the ranks of a replica.

    num_experts: of the layer, on all ranks.
    """

    name: ClassVar[str]

    def __init__(self, num_experts: int, topology: Topology) -> None:
        self.num_experts = num_experts
        self.topology = topology
        self.num_local_experts = num_experts // topology.ep
        self.first_local_expert = topology.owned_experts(num_experts).start

    @abstractmethod
    def dispatch(
        self, x_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
    ) -> tuple[RoutedTokens, Any]:
        """Send each token to its experts. Returns what this rank received, and the way back.

        All ranks of a lane give the same tokens. A dropped copy has index NO_EXPERT. Collective
        over the replica: a rank without tokens takes part all the same.
        """

    @abstractmethod
    def combine(self, y_RH: Tensor, metadata: Any) -> Tensor:
        """The sums of all ranks for this lane's tokens, added up: [T, H] in the dtype of y.

        y_RH: this rank's weighted sums over its experts and rows, for each token that it received.
        Added in float32 in the order of the ranks and rounded once; the same bits on every rank of
        the lane. Collective over the replica.
        """

    def routed_to_local(self, x_RH: Tensor, index_RK: Tensor, weights_RK: Tensor) -> RoutedTokens:
        """The copies that go to this rank's experts, from numbers of the whole layer's experts."""
        routed = RoutedTokens.from_routing(
            x_RH, index_RK, weights_RK, self.num_local_experts, self.first_local_expert
        )
        # On a GPU the host would wait for the number of copies, and shapes would not be static.
        return routed.without_dropped() if x_RH.device.type == "cpu" else routed


class LocalDispatcher(Dispatcher):
    """All experts are here: nothing moves."""

    name = "local"

    def dispatch(
        self, x_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
    ) -> tuple[RoutedTokens, None]:
        return self.routed_to_local(x_TH, top_k_index_TK, top_k_weights_TK), None

    def combine(self, y_RH: Tensor, metadata: None) -> Tensor:
        return y_RH
