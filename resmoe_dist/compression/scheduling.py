"""Which process does which task, and how results come together: alone, under MPI, or DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch

from resmoe_dist.errors import UserError

T = TypeVar("T")


class Workers(Protocol):
    """The processes of one run. Rank 0 writes what belongs to no single task."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, in rank order, on every rank. All ranks must call it."""
        ...


def together(workers: Workers, action: Callable[[], T]) -> list[T]:
    """Everyone's `action()`, in rank order, on every rank. All ranks must call it.

    Raises UserError on every rank if one rank's action does.
    """
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = str(error)
    for said in workers.gather(failure):
        if said:
            raise UserError(said)
    return workers.gather(result)


class SingleWorker:
    """One process, nothing to coordinate."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any]:
        """Just this value."""
        return [value]


class MpiWorkers:
    """The ranks of MPI's world communicator."""

    def __init__(self) -> None:
        from mpi4py import MPI  # importing it starts MPI, so only when launched under it

        self._world = MPI.COMM_WORLD
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()

    def gather(self, value: Any) -> list[Any]:
        """`Comm.allgather`."""
        return self._world.allgather(value)


class DeepSpeedWorkers:
    """The ranks that the `deepspeed` launcher started, over gloo."""

    def __init__(self) -> None:
        if not torch.distributed.is_initialized():
            # A rank that is done waits as long as the slowest one still has tasks.
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """`torch.distributed.all_gather_object`."""
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        return gathered


_MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")


def find_workers() -> Workers:
    """The workers of the launcher this process was started by, with threads to fit.

    mpirun and the deepspeed launcher are told by the variables they set; each rank then takes its
    share of this host's cores, so that the ranks do not fight over them.
    """
    if any(int(os.environ.get(name, "1")) > 1 for name in _MPI_SIZE_VARIABLES):
        workers: Workers = MpiWorkers()
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        workers = DeepSpeedWorkers()
    else:
        return SingleWorker()
    local_size = int(
        os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
        or os.environ.get("LOCAL_WORLD_SIZE")
        or workers.size
    )
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    return workers
