"""Greedy generation of one batch on several ranks, with the moment of every step.

Legend: B sequences of this rank, S prompt tokens, N new tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.model_systems import ModelSystem
from benchmarks.processes import memory_of, reset_high_water
from benchmarks.ranks import barrier, of_all_ranks


@dataclass
class Generated:
    """What one rank generated of a batch.

    tokens_BN: new tokens of its sequences; None if it took no part. moments: seconds from the start
    to the end of each step. growth: bytes by which memory grew meanwhile.
    """

    tokens_BN: Tensor | None = None
    moments: list[float] = field(default_factory=list)
    growth: int = 0


class _Moments(StoppingCriteria):
    """Notes the time of every step; stops nothing."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        self.found.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate(system: ModelSystem, ids_BS: Tensor, new_tokens: int) -> Generated:
    """Continue a batch of all ranks by `new_tokens` tokens each. Collective over the ranks."""
    barrier()
    model, mine_BS = system.model, system.share(ids_BS)
    if model is None:
        return Generated()
    if system.implementation is not None:
        model.set_experts_implementation(system.implementation)
    given_BS = mine_BS if len(mine_BS) else ids_BS[:1]
    reset_high_water()
    before, watch = memory_of(os.getpid()).get("resident", 0), _Moments()
    with _threads(system.threads):
        began = time.perf_counter()
        all_B = model.generate(
            input_ids=given_BS,
            attention_mask=torch.ones_like(given_BS),
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
    growth = memory_of(os.getpid()).get("high_water", before) - before
    return Generated(
        all_B[: len(mine_BS), ids_BS.shape[1] :],
        [moment - began for moment in watch.found],
        max(0, growth),
    )


def slowest_steps(mine: Generated) -> np.ndarray:
    """Seconds from the start to the end of each step on the slowest rank: [N]."""
    return np.max([each for each in of_all_ranks(mine.moments) if each], axis=0)


def tokens_of_all(system: ModelSystem, mine: Generated, batch_size: int) -> Tensor:
    """The new tokens of a batch of all ranks: [batch_size, N].

    Each sequence is taken from the first rank that has it.
    """
    parts: dict[int, Tensor] = {}
    for batch, found in of_all_ranks((system.batch, mine.tokens_BN)):
        if found is not None:
            parts.setdefault(batch, found)
    all_BN = torch.cat([parts[batch] for batch in sorted(parts)])
    assert len(all_BN) == batch_size
    return all_BN


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with `count` threads; None leaves their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
