"""What the steps of one generation send and compute, and where their time goes, per MoE layer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from torch import Tensor

from benchmarks.generation import generate
from benchmarks.loads import expert_loads, imbalance, padding_factor
from benchmarks.model_systems import ModelSystem
from benchmarks.ranks import of_all_ranks
from benchmarks.stages import STAGES, stage_seconds
from benchmarks.tables import Row
from benchmarks.wire import Message, WireCount


def watch_steps(system: ModelSystem, ids_BS: Tensor, layers: int, steps: int) -> Row:
    """Collectives, bytes, stages, padding and imbalance. Collective over the ranks.

    ids_BS: prompts of all ranks. layers: MoE layers. steps: decode steps that are watched.
    """
    batch_size, length = ids_BS.shape
    counts, spans = [], []
    for new_tokens in (1, 1 + steps):
        with WireCount() as wire:
            found = _messages_in_blocks(wire, system, ids_BS, new_tokens)
        counts.append((wire.collectives, sum(of_all_ranks(wire.bytes))))
        spans.append(found)
    (calls, sent), (more_calls, more_sent) = counts
    per = max(1, steps) * layers
    prefill, both = spans
    run = partial(generate, system, ids_BS, 1 + steps)
    # The layers of the first step are the prefill's.
    seconds = [
        each for rank in of_all_ranks(stage_seconds(run, system.parts)[layers:]) for each in rank
    ]
    loads = [rank for rank in of_all_ranks(expert_loads(run, system.parts)) if rank]
    by_call = list(zip(*loads, strict=True))
    copies = batch_size * max(of_all_ranks(system.top_k))
    return {
        "wire": {
            "collectives": (more_calls - calls) / per,
            "bytes_per_token": (more_sent - sent) / per / batch_size,
        },
        "stages_ms": {
            stage: 1000 * statistics.fmean(each[stage] for each in seconds) if seconds else None
            for stage in STAGES
        },
        "prefill": {
            "empty_rows": empty_rows(prefill),
            "padding": padding_factor(by_call[:layers], copies * length, system.ranks_per_copy),
            "imbalance": imbalance(by_call[:layers]),
        },
        "decode": {
            "empty_rows": empty_rows(both[len(prefill) :]),
            "padding": padding_factor(by_call[layers:], copies, system.ranks_per_copy),
            "imbalance": imbalance(by_call[layers:]),
        }
        if steps
        else None,
    }


def collectives_of_step(system: ModelSystem, ids_BS: Tensor) -> int:
    """Collectives of this rank in one decode step. Collective over the ranks."""
    found = []
    for new_tokens in (1, 2):
        with WireCount() as wire:
            generate(system, ids_BS, new_tokens)
        found.append(wire.collectives)
    return found[1] - found[0]


def empty_rows(messages: Sequence[Message]) -> float | None:
    """Rows of zeros / other rows, in what all ranks gave to collectives; None if they gave none.

    Collective over the ranks. messages: of this rank.
    """
    mine = (sum(m.rows for m in messages), sum(m.empty_rows for m in messages))
    rows, empty = (sum(each) for each in zip(*of_all_ranks(mine), strict=True))
    return empty / (rows - empty) if rows > empty else None


def _messages_in_blocks(
    wire: WireCount, system: ModelSystem, ids_BS: Tensor, new_tokens: int
) -> list[Message]:
    """Generate, and return the messages of MoE layers alone."""
    found: list[Message] = []
    with ExitStack() as stack:
        for block in (parts.block for parts in system.parts):
            first: list[int] = []
            enter = block.register_forward_pre_hook(
                lambda *_, first=first: first.append(len(wire.messages))
            )
            leave = block.register_forward_hook(
                lambda *_, first=first: found.extend(wire.messages[first.pop() :])
            )
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        generate(system, ids_BS, new_tokens)
    return found
