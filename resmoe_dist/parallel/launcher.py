"""Starting ranks, and failing well: one line for a user's mistake, every rank down at once."""

from __future__ import annotations

import argparse
import base64
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from torch.distributed.distributed_c10d import _get_default_store

from resmoe_dist.errors import UserError
from resmoe_dist.parallel.topology import SINGLE_PROCESS, Topology, build_topology

USER_ERROR = 2
# As a shell reports a process that a signal ended.
_SIGNALLED = 128
_BROKEN_PIPE = _SIGNALLED + signal.SIGPIPE
_FAILED_KEY = "resmoe_dist/failed"
# The launchers look after their ranks about once a second.
_GRACE_SECONDS = 10
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
_INTERRUPT_SECONDS = 2
_STARTED_BY_US = "RESMOE_STARTED_RANKS"


def add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that place a launch script on a grid, and what the launchers themselves add."""
    parser.add_argument("--ep", type=int, default=1, help="expert-parallel ranks")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    add_launcher_arguments(parser)


def add_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    """`--local_rank`, which the `deepspeed` launcher adds to every command line; it is not read."""
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def start_grid(ep: int, tp: int, script: str, arguments: Sequence[str]) -> Topology:
    """Make this process one rank of an ep x tp grid and return its place in it.

    Under a launcher that started the right number of ranks: join them. On a machine without
    accelerators, where the `deepspeed` launcher starts one rank per NUMA node: replace this process
    by the DeepSpeed launcher with ep·tp ranks, and say so. Alone with ep·tp = 1: no process group.

    Raises UserError when a machine with accelerators runs a number of ranks that does not fit.
    """
    if ep < 1 or tp < 1:
        raise UserError(f"--ep {ep} --tp {tp}: both must be 1 or more")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % (ep * tp) and get_accelerator().device_name() == "cpu":
        if os.environ.get(_STARTED_BY_US):
            raise UserError(f"started {ep * tp} ranks, found {world}; give --ep and --tp once")
        _start_ranks_on_cpu(ep * tp, script, arguments)
    if world % (ep * tp):
        raise UserError(
            f"--ep {ep} --tp {tp} needs {ep * tp} ranks or a multiple, {world} were started; run "
            f"deepspeed --num_gpus {ep * tp} {script} …"
        )
    if world == 1:
        return SINGLE_PROCESS
    _join_world()
    return build_topology(ep, tp)


def run_entry_point(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its code.

    A UserError becomes one line on standard error and exit code 2; of several ranks that fail
    together, the first one speaks. SIGINT and SIGTERM raise KeyboardInterrupt in `main`: the text
    that leaves it with, if any, is printed, and the exit code is 130 or 143. Any failure ends this
    process at once, without waiting in destructors for ranks that wait for it, and the launcher
    then takes the others down.
    """
    with _interrupts_raised() as seen:
        try:
            code = main() or 0
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read the output has seen enough (`… | head`); there is nobody left to tell.
            os._exit(_BROKEN_PIPE)
        except UserError as error:
            _fail(f"error: {error}", USER_ERROR)
        except KeyboardInterrupt as interruption:
            if str(interruption):
                print(interruption, file=sys.stderr, flush=True)
            _leave(_SIGNALLED + (seen or [signal.SIGINT])[0])
        except Exception:
            # A rank whose peers are gone fails too; only the first failure explains anything.
            _fail(f"rank {launched_rank()} failed\n{traceback.format_exc()}", 1)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.exit(code)


def quiet_libraries() -> None:
    """Warnings only from the libraries, and their progress bars on rank 0's terminal alone."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    if launched_rank() or not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _join_world() -> None:
    accelerator = get_accelerator()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() == "cpu":
        # Ranks that share a host share its cores.
        local_size = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
        # DeepSpeed would compile a shared-memory all-reduce, which nothing here calls and whose
        # segments, 66 MB a rank, stay behind in /dev/shm when the process has ended.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    else:
        accelerator.set_device(local_rank)
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _start_ranks_on_cpu(ranks: int, script: str, arguments: Sequence[str]) -> None:
    """Replace this process by DeepSpeed's launcher; of several ranks started, rank 0 does it."""
    if launched_rank():
        sys.exit(0)
    print(f"no accelerator here: starting {ranks} ranks on the CPU", file=sys.stderr, flush=True)
    started = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    environment = {k: v for k, v in os.environ.items() if k not in (*started, "MASTER_PORT")}
    environment |= {_STARTED_BY_US: str(ranks), "DS_ACCELERATOR": "cpu"}
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode())
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.launch", "--quiet", "--no_local_rank"),
        *(f"--world_info={world.decode()}", "--master_addr=127.0.0.1"),
        *(f"--master_port={free_port()}", script, *arguments),
    ]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


def _fail(text: str, code: int) -> None:
    """Print to standard error and leave; a rank that is not the first to fail waits before.

    It is usually taken down meanwhile: the launcher passes on the exit code that it sees first,
    and that must be the first rank's. A rank that nobody takes down had a failure of its own.
    """
    first = launched_rank() == 0
    if torch.distributed.is_initialized():
        # The store lives in rank 0: where it is gone, so is the need to explain.
        first = False
        with suppress(Exception), _muted_standard_error():
            first = _get_default_store().add(_FAILED_KEY, 1) == 1
    if not first:
        # What takes it down is the first rank's failure, not an interruption to speak of.
        for number in _INTERRUPTS:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(_GRACE_SECONDS)
    print(text, file=sys.stderr, flush=True)
    _leave(code)


@contextmanager
def _interrupts_raised() -> Iterator[list[int]]:
    """Within it, the first of `_INTERRUPTS` is noted and raises KeyboardInterrupt.

    Those after it, such as a launcher's when Ctrl-C reached it as well as its ranks, do nothing:
    the process is leaving. If compiled code, or a rank that does not answer, holds the exception
    up, the process ends without it. A signal that was ignored before stays ignored.
    """
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if not seen:
            seen.append(number)
            raise KeyboardInterrupt

    def leave_in_time() -> None:
        while arrived := os.read(read_end, 1):
            if arrived[0] in _INTERRUPTS:
                time.sleep(_INTERRUPT_SECONDS)
                os._exit(_SIGNALLED + arrived[0])
        os.close(read_end)

    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    threading.Thread(target=leave_in_time, daemon=True).start()
    # Unlike handlers, this is done the moment that a signal comes.
    other_end = signal.set_wakeup_fd(write_end)
    before = {number: signal.getsignal(number) for number in _INTERRUPTS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(other_end)
        os.close(write_end)


@contextmanager
def _muted_standard_error() -> Iterator[None]:
    """Standard error goes nowhere, C++'s too: it logs a lost store with a backtrace."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def launched_rank() -> int:
    """This process's rank by the word of its launcher; 0 for one that was started alone."""
    found = (
        os.environ.get(name)
        for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    )
    return int(next((rank for rank in found if rank), "0"))


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
