"""Counting what goes through the communication library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import deepspeed.comm as dist
from torch import Tensor

# Every collective that moves tensors between ranks.
NAMES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "send",
)


@dataclass(frozen=True)
class Call:
    """One collective: its name, the bytes that this rank gave, its part sizes (None: equal)."""

    name: str
    given_bytes: int
    send_sizes: list[int] | None
    ranks: int

    @property
    def wire_bytes(self) -> int:
        """Bytes that leave this rank in an all-to-all with equal parts."""
        return self.given_bytes * (self.ranks - 1) // self.ranks


@contextmanager
def recorded_collectives() -> Iterator[list[Call]]:
    """All collectives of DeepSpeed's communication library inside the block, in order."""
    calls: list[Call] = []

    def recording(name: str):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            given = next(a for a in reversed(args) if isinstance(a, Tensor))
            ranks = dist.get_world_size(kwargs.get("group"))
            calls.append(Call(name, given.nbytes, kwargs.get("input_split_sizes"), ranks))
            return original(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in NAMES:
            if hasattr(dist, name):
                stack.enter_context(patch.object(dist, name, recording(name)))
        yield calls
