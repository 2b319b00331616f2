"""`auto`: `decode` for steps of few tokens, `exchange` for the others.

All ranks of a replica must choose alike, but a rank only knows the tokens of its own lane. So the
first MoE layer of a stack agrees on the largest lane, with one small collective per forward pass;
the other layers of the stack, which see the same tokens, use the answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resmoe_dist.parallel.collectives import gather
from resmoe_dist.parallel.dispatch.base import Dispatcher
from resmoe_dist.parallel.dispatch.decode import DecodeDispatcher
from resmoe_dist.parallel.dispatch.exchange import ExchangeDispatcher
from resmoe_dist.parallel.topology import Topology
from resmoe_dist.routing import RoutedTokens

# Tokens of the largest lane up to which `decode` is used until it is measured.
DEFAULT_DECODE_LIMIT = 32


@dataclass
class StepSizes:
    """What the layers of one stack know about the current forward pass.

    largest_lane: its tokens. decode_limit: up to so many tokens `decode` is used; infinity forces
    it.
    """

    largest_lane: int = 0
    decode_limit: float = DEFAULT_DECODE_LIMIT

    @classmethod
    def for_form(cls, form: str) -> StepSizes:
        """For a form of dispatch by name: `decode` is used at any size if it was asked for."""
        return cls(decode_limit=math.inf) if form == DecodeDispatcher.name else cls()

    def agree(self, tokens: int, device: torch.device, topology: Topology) -> None:
        """Set `largest_lane` from the tokens of every lane. Collective over the replica."""
        if topology.peer_group is None:
            self.largest_lane = tokens
            return
        mine = torch.tensor([tokens], device=device)
        self.largest_lane = int(gather(mine, topology.peer_group).max())


class _Chosen(NamedTuple):
    form: Dispatcher
    metadata: Any


class AutoDispatcher(Dispatcher):
    """See the module's docstring.

    steps: shared by the layers of a stack. leads: whether this is the stack's first layer.
    """

    name = "auto"

    def __init__(
        self, num_experts: int, topology: Topology, steps: StepSizes, *, leads: bool
    ) -> None:
        super().__init__(num_experts, topology)
        self.steps = steps
        self.leads = leads
        self.decode = DecodeDispatcher(num_experts, topology)
        self.exchange = ExchangeDispatcher(num_experts, topology)

    def dispatch(
        self, x_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
    ) -> tuple[RoutedTokens, _Chosen]:
        if self.leads:
            self.steps.agree(len(x_TH), x_TH.device, self.topology)
        form: Dispatcher = self.exchange
        if self.steps.largest_lane <= self.steps.decode_limit:
            form = self.decode
            self.decode.capacity = self.steps.largest_lane
        routed, metadata = form.dispatch(x_TH, top_k_index_TK, top_k_weights_TK)
        return routed, _Chosen(form, metadata)

    def combine(self, y_RH: Tensor, metadata: _Chosen) -> Tensor:
        return metadata.form.combine(y_RH, metadata.metadata)
