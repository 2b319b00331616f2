"""The number of lanes that completes some prompts soonest, timed on the model itself.

Fewer lanes divide everything that is not an expert among more ranks; more lanes leave fewer
sequences to each rank. Which is faster depends on the sizes, the links and the cores, so a few real
steps of the first batch are timed. A rank's experts are the same for any number of lanes and are
read once; everything else is read again for each number. At most two of these are in memory.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resmoe_dist.heap import return_freed_memory
from resmoe_dist.parallel.collectives import gather
from resmoe_dist.parallel.topology import Topology, build_topology, lane_choices
from resmoe_dist.runtime.generation import GenerationOptions, generate_batch, lane_batches

# Decode steps of one turn, and turns of each contender after one that sets up connections.
_STEPS = 6
_TURNS = 3
# A comparison that has taken so long begins no more turns.
_ENOUGH_SECONDS = 5.0
# A number of lanes that is so much slower gets no more turns.
_CLEARLY_SLOWER = 1.3


@dataclass(frozen=True)
class OnLanes:
    """A loaded model, and the grid with the number of lanes that it was loaded for."""

    model: PreTrainedModel
    place: Topology


@dataclass(frozen=True)
class Prompts:
    """What is to be completed."""

    tokenizer: PreTrainedTokenizerBase
    texts: list[str]
    options: GenerationOptions


# The model for a grid, with the experts of another model of the same folder, ep and tp.
Load = Callable[[Topology, PreTrainedModel], PreTrainedModel]


def fastest_lanes(loaded: OnLanes, load: Load, prompts: Prompts) -> OnLanes:
    """The model on the number of lanes that completes the prompts soonest.

    loaded: on one of the numbers. Collective over the world; the same number on all ranks.
    """
    place, best = loaded.place, loaded
    for lanes in lane_choices(place.ep, place.dp):
        if lanes != place.lanes:
            other = build_topology(place.ep, place.tp, lanes)
            best = _faster(best, OnLanes(load(other, best.model), other), prompts)
            # Modules refer to each other in circles.
            gc.collect()
            return_freed_memory()
    return best


def _faster(first: OnLanes, second: OnLanes, prompts: Prompts) -> OnLanes:
    """The faster of two, which take turns."""
    found: list[list[float]] = [[], []]
    spent = 0.0
    for turn in range(1 + _TURNS):
        for i in (0, 1) if turn % 2 else (1, 0):
            prefill, step = timed_steps((first, second)[i], prompts)
            found[i].append(predicted_seconds((first, second)[i].place, prompts, prefill, step))
            spent += prefill + _STEPS * step
        ends = sorted(seconds[-1] for seconds in found)
        if spent > _ENOUGH_SECONDS or (turn and ends[1] > _CLEARLY_SLOWER * ends[0]):
            break
    medians = [statistics.median(seconds[1:] or seconds) for seconds in found]
    return first if medians[0] <= medians[1] else second


def timed_steps(loaded: OnLanes, prompts: Prompts) -> tuple[float, float]:
    """Seconds of the first batch's prefill, and of a decode step, on the slowest rank.

    The step is 0 if a single token is asked for. Collective over the world.
    """
    place, options = loaded.place, prompts.options
    numbers = lane_batches(len(prompts.texts), place, options.batch)[0]
    few = replace(options, max_new_tokens=min(options.max_new_tokens, 1 + _STEPS))
    torch.distributed.barrier()
    began = time.perf_counter()
    found = generate_batch(
        loaded.model, prompts.tokenizer, prompts.texts, numbers, place, few
    ).moments
    between = [later - earlier for earlier, later in pairwise(found)]
    step = statistics.median(between) if between else 0.0
    world = torch.distributed.group.WORLD
    assert world is not None
    mine = torch.tensor([[found[0] - began, step]], dtype=torch.float64)
    # The same numbers on all ranks, so that they choose alike.
    slowest = gather(mine.to(loaded.model.device), world).amax(0)
    return float(slowest[0]), float(slowest[1])


def predicted_seconds(place: Topology, prompts: Prompts, prefill: float, step: float) -> float:
    """Of all batches, if each takes as long as the first and no text ends early."""
    batches = len(lane_batches(len(prompts.texts), place, prompts.options.batch))
    return batches * (prefill + (prompts.options.max_new_tokens - 1) * step)
