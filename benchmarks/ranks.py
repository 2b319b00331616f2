"""Benchmarks of several ranks: joining them, timing them together, collecting their figures.

Every rank runs the whole benchmark. A time is that of the slowest rank, from a barrier on, so all
ranks see the same times and decide alike. Rank 0 prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import positive
from benchmarks.timing import Clock, T
from resmoe_dist.parallel.launcher import start_grid
from resmoe_dist.parallel.topology import Topology

# Read by all ranks together before a turn.
_EVICTING_BYTES = 512 << 20


def add_grid_arguments(parser: argparse.ArgumentParser, ep: int = 1, tp: int = 1) -> None:
    """`--ep` and `--tp`; and `--local_rank`, which the `deepspeed` launcher adds."""
    add = parser.add_argument
    add("--ep", type=positive, default=ep, help="expert-parallel ranks (default %(default)s)")
    add("--tp", type=positive, default=tp, help="tensor-parallel ranks (default %(default)s)")
    add("--local_rank", help=argparse.SUPPRESS)


def join_grid(args: argparse.Namespace) -> Topology:
    """This rank's place in the grid of the options; starts the ranks where no launcher has.

    Each rank gets its share of the cores unless `--threads` says otherwise.
    """
    topology = start_grid(args.ep, args.tp)
    if args.threads:
        torch.set_num_threads(args.threads)
    return topology


class RanksClock(Clock):
    """Times all ranks together: they start at a barrier, and the slowest one counts.

    clock: whose options it takes. The ranks share the bytes that evict caches.
    """

    def __init__(self, clock: Clock) -> None:
        vars(self).update(vars(clock))

    def timed(self, action: Callable[[], T]) -> tuple[T, float]:
        barrier()
        return super().timed(action)

    def elapsed(self, began: float) -> float:
        return largest(super().elapsed(began))

    def evicting_bytes(self) -> int:
        return min(self.effort.evicting_bytes, _EVICTING_BYTES // world_size())


def world_size() -> int:
    """Ranks of this launch."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """This process among them."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        torch.distributed.barrier()


def of_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks."""
    found: list[Any] = [value]
    if world_size() > 1:
        found = [None] * world_size()
        torch.distributed.all_gather_object(found, value)
    return found


def largest(value: float) -> float:
    """The largest of all ranks' values."""
    if world_size() == 1:
        return value
    found = torch.tensor([value], dtype=torch.float64)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return float(found)
