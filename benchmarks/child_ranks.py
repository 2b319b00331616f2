"""Ranks as child processes of a benchmark: real ones joined by gloo, or one without its peers.

A rank without peers runs in a world of any size on PyTorch's `fake` backend. It does all that a
rank of that world does, but its collectives send nothing and return at once, with its own data in
place of its peers'. So a time is that of computation alone, and the result is meaningless.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from resmoe_dist.parallel.rendezvous import free_port

_context = multiprocessing.get_context("forkserver")
# What the server that children fork from imports once.
_PRELOADED = ["resmoe_dist.runtime.loading", "transformers.models.mixtral.modeling_mixtral"]


def run_alone(world: int, threads: int, function: Callable[..., Any], *args: Any) -> Any:
    """What `function(*args)` returns as rank 0 of `world` ranks, of which only it exists."""
    return _run(1, world, threads, "fake", function, args)[0]


def run_together(world: int, threads: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of `world` ranks on gloo, in their order.

    threads: of each rank. Raises RuntimeError with a rank's traceback if it fails.
    """
    return _run(world, world, threads, "gloo", function, args)


def _run(
    ranks: int, world: int, threads: int, backend: str, function: Callable[..., Any], args: tuple
) -> list[Any]:
    # No effect if the server runs already.
    _context.set_forkserver_preload(_PRELOADED)
    port, pipes, processes = free_port(), [], []
    for rank in range(ranks):
        receiver, sender = _context.Pipe(duplex=False)
        place = (rank, world, port, threads, backend)
        process = _context.Process(
            target=_run_rank, args=(place, sender, function, args), daemon=True
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        results = []
        for rank, pipe in enumerate(pipes):
            try:
                failed, value = pickle.loads(pipe.recv_bytes())
            except EOFError as error:
                raise RuntimeError(f"rank {rank} of {world} ended without a result") from error
            if failed:
                raise RuntimeError(f"rank {rank} of {world} failed:\n{value}")
            results.append(value)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run_rank(place: tuple, sender: Connection, function: Callable[..., Any], args: tuple) -> None:
    rank, world, port, threads, backend = place
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, world, world, port)), strict=True))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    import deepspeed
    import torch

    from resmoe_dist.parallel.entry_point import quiet_libraries
    from resmoe_dist.parallel.launcher import join_world

    try:
        quiet_libraries()
        warnings.simplefilter("ignore", FutureWarning)
        if backend == "gloo":
            join_world()
        else:
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed(
                backend, auto_mpi_discovery=False, verbose=False, rank=rank, world_size=world
            )
        torch.set_num_threads(threads)
        outcome = (False, function(*args))
        # Rank 0 hosts the store, so it must not leave while others join groups.
        torch.distributed.barrier()
    except BaseException:
        outcome = (True, traceback.format_exc())
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    # Without destructors, which may wait for other ranks.
    os._exit(0)
