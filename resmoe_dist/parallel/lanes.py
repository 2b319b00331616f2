"""How many lanes suit a number of sequences, measured on the ranks themselves.

More lanes leave more of each batch to a rank, and need a dispatch of tokens; fewer lanes share the
work on each token, and add up more partial sums. The computation is the same, so what decides is
communication: per layer one sum of attention over the ranks of a lane, and the dispatch to experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from resmoe_dist.parallel.collectives import sum_over
from resmoe_dist.parallel.dispatch.auto import AutoDispatcher
from resmoe_dist.parallel.dispatch.base import Dispatcher
from resmoe_dist.parallel.dispatch.forms import dispatcher_for
from resmoe_dist.parallel.dispatch.measure import (
    least_seconds,
    random_call,
    round_trip,
    slowest_rank,
)
from resmoe_dist.parallel.topology import Topology, build_topology, lane_choices

# More tokens than this are not tried: their time is proportional to their number.
_MAX_TOKENS = 512


@dataclass(frozen=True)
class LayerSizes:
    """What the communication of one layer depends on."""

    hidden: int
    num_experts: int
    top_k: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Workload:
    """sequences: to complete. prompt_tokens: of the longest. new_tokens: of each.

    max_batch: sequences that a lane works on at a time.
    """

    sequences: int
    prompt_tokens: int
    new_tokens: int
    max_batch: int


def fastest_topology(
    place: Topology, sizes: LayerSizes, load: Workload, device: torch.device
) -> Topology:
    """The grid of `place` with the number of lanes that completes a workload soonest.

    Only numbers of lanes that all get a sequence are tried. Collective over the world; the answer
    is the same on all ranks.
    """
    choices = [n for n in lane_choices(place.ep, place.dp) if n <= max(load.sequences, place.dp)]
    if len(choices) < 2:
        return place
    found = {
        n: place if n == place.lanes else build_topology(place.ep, place.tp, n) for n in choices
    }
    seconds = {n: _seconds(topology, sizes, load, device) for n, topology in found.items()}
    return found[min(choices, key=seconds.__getitem__)]


def _seconds(topology: Topology, sizes: LayerSizes, load: Workload, device: torch.device) -> float:
    """Of communication in one layer, from the prompts to the last token."""
    share = -(-load.sequences // topology.lanes)
    batch = min(share, load.max_batch)
    prompt = _layer_seconds(topology, sizes, batch * load.prompt_tokens, device)
    step = _layer_seconds(topology, sizes, batch, device)
    return -(-share // batch) * (prompt + load.new_tokens * step)


def _layer_seconds(
    topology: Topology, sizes: LayerSizes, tokens: int, device: torch.device
) -> float:
    """Of one layer on the slowest rank, for so many tokens per lane."""
    tried = min(tokens, _MAX_TOKENS)
    call = random_call(tried, sizes.hidden, sizes.num_experts, sizes.top_k, sizes.dtype, device)
    dispatcher = dispatcher_for(sizes.num_experts, topology)
    forms: list[Dispatcher] = [dispatcher]
    if isinstance(dispatcher, AutoDispatcher):
        dispatcher.decode.capacity = tried
        forms = [dispatcher.decode, dispatcher.exchange]
    lane = topology.lane_group

    def layer(form: Dispatcher) -> None:
        if lane is not None:
            sum_over(call[0], lane)
        round_trip(form, call)

    mine = min(least_seconds(partial(layer, form), device) for form in forms)
    world = torch.distributed.group.WORLD
    assert world is not None
    return slowest_rank(mine, world, device) * tokens / tried
