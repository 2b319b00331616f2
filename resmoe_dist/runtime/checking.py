"""Checks of a running model: do the ranks of a lane route alike, and is everything finite?

All ranks of a lane hold the same tokens, so their routers must give the same bits. A rank that
differs would silently compute something else. `check_steps` compares the ranks after every forward
pass, with one small collective and one wait for the device; a model without it pays nothing.

Legend: T tokens, K experts per token, R received tokens, H hidden, C calls of MoE layers in a step,
P ranks of the replica.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resmoe_dist.errors import FailedCheckError, UserError
from resmoe_dist.parallel.collectives import gather
from resmoe_dist.parallel.dispatch import Dispatcher
from resmoe_dist.parallel.topology import Topology
from resmoe_dist.routing import RoutedTokens
from resmoe_dist.runtime.layer import ResMoE

# Odd, so that multiplying by it loses no bits.
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)


class _Facts(NamedTuple):
    """What one rank says about one call of a layer, as it travels: one number each."""

    finite_input: int
    routing: int
    finite_output: int


def check_steps(model: PreTrainedModel, topology: Topology) -> None:
    """Check every forward pass of a loaded model from now on.

    A pass in which a check fails raises FailedCheckError, with the same text on all ranks that take
    it together: those of a replica, or of a lane of several. Non-finite numbers are looked for in
    what MoE layers get and in what their experts give.
    Raises UserError for a model without compressed experts.
    """
    layers = {n: m.deepspeed_moe for n, m in model.named_modules() if isinstance(m, ResMoE)}
    if not layers:
        raise UserError("--check: the model has no compressed experts; leave --check out")
    step = _Step(topology)
    for name, moe in layers.items():
        moe.dispatcher = _CheckedDispatcher(moe.dispatcher, name, step)
    model.register_forward_hook(lambda *_: step.finish())


class _Step:
    """The calls of MoE layers since the last check. Encoders count to the pass that follows."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._number = 0
        self._layers: list[str] = []
        self._facts: list[Tensor] = []

    def enter(self, layer: str, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> None:
        """A layer is called."""
        self._layers.append(layer)
        self._facts += [_is_finite(x_TH), routing_digest(index_TK, weights_TK)]

    def leave(self, y_RH: Tensor) -> None:
        """The experts of the layer that was entered last have run."""
        self._facts.append(_is_finite(y_RH))

    def finish(self) -> None:
        """Compare the ranks. Collective over those that take every step together."""
        layers, self._layers = self._layers, []
        mine_CF, self._facts = torch.stack(self._facts).view(len(layers), len(_Facts._fields)), []
        self._number += 1
        group = self._topology.linked_group
        all_CF = mine_CF if group is None else gather(mine_CF, group)
        found_PCF = all_CF.view(-1, *mine_CF.shape).tolist()
        for call, layer in enumerate(layers):
            of_ranks = [_Facts(*rank[call]) for rank in found_PCF]
            problem = first_problem(of_ranks, self._topology)
            if problem is not None:
                raise FailedCheckError(f"{problem} in {layer}, step {self._number}")


class _CheckedDispatcher(Dispatcher):
    """A form of dispatch that notes what goes in and comes back."""

    def __init__(self, form: Dispatcher, layer: str, step: _Step) -> None:
        super().__init__(form.num_experts, form.topology)
        self._form, self._layer, self._step = form, layer, step

    def dispatch(
        self, x_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
    ) -> tuple[RoutedTokens, Any]:
        self._step.enter(self._layer, x_TH, top_k_index_TK, top_k_weights_TK)
        return self._form.dispatch(x_TH, top_k_index_TK, top_k_weights_TK)

    def combine(self, y_RH: Tensor, metadata: Any) -> Tensor:
        self._step.leave(y_RH)
        return self._form.combine(y_RH, metadata)


def routing_digest(index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """A number that any other routing most likely does not have, as int64."""
    bits = torch.cat([index_TK.flatten().long(), _bits(weights_TK.flatten())])
    places = torch.arange(1, len(bits) + 1, device=bits.device) * _MULTIPLIER
    # Each term mixes a value with its place; all arithmetic wraps around.
    mixed = (bits + places) * (places | 1)
    return ((mixed ^ (mixed >> 29)) * _MULTIPLIER).sum()


def first_problem(of_ranks: list[_Facts], topology: Topology) -> str | None:
    """What is wrong with one call of a layer, by the linked ranks in order; None if nothing.

    Of several problems the first in the order of computation is named.
    """
    first = topology.rank // topology.linked_size * topology.linked_size
    for rank, facts in enumerate(of_ranks, first):
        if not facts.finite_input:
            return f"rank {rank}: the layer's input is not finite"
    for start in range(0, len(of_ranks), topology.lane_size):
        lane = [facts.routing for facts in of_ranks[start : start + topology.lane_size]]
        usual = Counter(lane).most_common(1)[0][0]
        for rank, routing in enumerate(lane, first + start):
            if routing != usual:
                other = first + start + lane.index(usual)
                return f"rank {rank} routes differently from rank {other} of its lane"
    for rank, facts in enumerate(of_ranks, first):
        if not facts.finite_output:
            return f"rank {rank}: the experts' output is not finite"
    return None


def _is_finite(values: Tensor) -> Tensor:
    return values.isfinite().all().long()


def _bits(values: Tensor) -> Tensor:
    """The bits of floating-point numbers, as int64."""
    return values.float().contiguous().view(torch.int32).long()
