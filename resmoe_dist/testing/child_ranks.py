"""Ranks as child processes: real ones joined by gloo, or one without its peers.

The processes fork from a server that has imported the heavy libraries once: eight ranks start in
seconds instead of minutes on two cores.

A rank without peers runs in a world of any size on PyTorch's `fake` backend. It does all that a
rank of that world does, but its collectives send nothing and return at once, with its own data in
place of its peers'. So a time is that of computation alone, and the result is meaningless.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from resmoe_dist.parallel.rendezvous import free_port

_context = multiprocessing.get_context("forkserver")
_PRELOADED = [
    *("resmoe_dist.runtime.loading", "resmoe_dist.testing"),
    "transformers.models.mixtral.modeling_mixtral",
]


class RankError(RuntimeError):
    """A rank raised, died or hangs."""


@dataclass(frozen=True)
class _Place:
    """One rank of a world. threads: of PyTorch; None leaves the share of this machine's cores."""

    rank: int
    world: int
    port: int
    backend: str
    threads: int | None


def preload(*modules: str) -> None:
    """Modules that the server imports too. No effect after the first rank has started."""
    _context.set_forkserver_preload([*_PRELOADED, *modules])


preload()


def run_on_ranks(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float | None = 240,
    threads: int | None = None,
) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo world; returns the results in rank order.

    function: at the top level of a module. threads: of each rank. If a rank fails, or none has
    ended for `timeout` seconds, the others are killed. Raises RankError, with a rank's traceback.
    """
    return _run(world, world, threads, "gloo", timeout, function, args)


def run_alone(world: int, function: Callable[..., Any], *args: Any, threads: int) -> Any:
    """What `function(*args)` returns as rank 0 of `world` ranks, of which only it exists."""
    return _run(1, world, threads, "fake", None, function, args)[0]


def _run(
    ranks: int,
    world: int,
    threads: int | None,
    backend: str,
    timeout: float | None,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> list[Any]:
    port, pipes, processes = free_port(), [], []
    for rank in range(ranks):
        receiver, sender = _context.Pipe(duplex=False)
        place = _Place(rank, world, port, backend, threads)
        process = _context.Process(
            target=_run_rank, args=(place, sender, function, args), daemon=True
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, processes, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], processes: list[Any], timeout: float | None) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = None if timeout is None else time.monotonic() + timeout
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(waiting, timeout=left)
        if not ready:
            raise RankError(f"ranks {[r for r in range(len(pipes)) if r not in results]} hang")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                failed, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(1)
                code = processes[rank].exitcode
                raise RankError(f"rank {rank} died with exit code {code}") from None
            if failed:
                raise RankError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(
    place: _Place, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.rank),
        "WORLD_SIZE": str(place.world),
        "LOCAL_SIZE": str(place.world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(place.port),
    }
    import deepspeed
    import torch

    from resmoe_dist.parallel.entry_point import quiet_libraries
    from resmoe_dist.parallel.launcher import join_world, leave_out_shared_memory

    try:
        quiet_libraries()
        warnings.simplefilter("ignore", FutureWarning)
        if place.backend == "gloo":
            join_world()
        else:
            leave_out_shared_memory()
            deepspeed.init_distributed(
                place.backend,
                auto_mpi_discovery=False,
                verbose=False,
                rank=place.rank,
                world_size=place.world,
            )
        if place.threads is not None:
            torch.set_num_threads(place.threads)
        outcome = (False, function(*args))
        # Rank 0 hosts the store, so it must not leave while other ranks still join groups.
        torch.distributed.barrier()
    except BaseException:
        outcome = (True, traceback.format_exc())
    # Pickled by value: torch sends handles, which are useless after the sender has ended.
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    # Without destructors: a finished rank must not wait for a failed one.
    os._exit(0)
