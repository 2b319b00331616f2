"""Runs a function on real processes joined by gloo, as a launcher would.

The processes fork from a server that has imported the heavy libraries once: a test of eight ranks
takes seconds instead of minutes on two cores.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from resmoe_dist.parallel.rendezvous import free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "resmoe_dist.runtime.loading",
        "tests.models",
        "transformers.models.mixtral.modeling_mixtral",
    ]
)


def run_on_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 240
) -> list:
    """Call `function(*args)` on every rank of a gloo world; returns the results in rank order.

    function: at the top level of a module. If a rank fails, its traceback is reported and the other
    ranks are killed. After `timeout` seconds all ranks are killed.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(world):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_run_rank, args=(rank, world, port, sender, function, args), daemon=True
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


def _collect(pipes: list[Connection], processes: list, timeout: float) -> list:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {[r for r in range(len(pipes)) if r not in results]} hang"
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                failed, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(1)
                raise AssertionError(
                    f"rank {rank} died with exit code {processes[rank].exitcode}"
                ) from None
            assert not failed, f"rank {rank} failed:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(
    rank: int, world: int, port: int, sender: Connection, function: Callable[..., Any], args: tuple
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from resmoe_dist.parallel.entry_point import quiet_libraries
    from resmoe_dist.parallel.launcher import join_world

    try:
        quiet_libraries()
        join_world()
        outcome = (False, function(*args))
        # Rank 0 hosts the store, so it must not leave while other ranks still join groups.
        torch.distributed.barrier()
    except BaseException:
        outcome = (True, traceback.format_exc())
    # Pickled by value: torch sends handles, which are useless after the sender has ended.
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    # Skip destructors: a finished rank must not wait for a failed one.
    os._exit(0)
