"""Starting and joining the ranks of a grid."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Mapping

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from resmoe_dist.errors import UserError
from resmoe_dist.parallel.agreement import check_agreement, library_versions
from resmoe_dist.parallel.entry_point import launched_rank
from resmoe_dist.parallel.hosts import connect_hosts
from resmoe_dist.parallel.launched import LaunchedRank, launched
from resmoe_dist.parallel.rendezvous import free_port, rendezvous_environment
from resmoe_dist.parallel.topology import SINGLE_PROCESS, Topology, build_topology
from resmoe_dist.parallel.watch import DEFAULT_TIMEOUT, current_watch

# Set for ranks that `start_grid` started: they must not start more.
STARTED_BY_US = "RESMOE_STARTED_RANKS"


def start_grid(
    ep: int,
    tp: int,
    program: list[str] | None = None,
    *,
    lanes: int | None = None,
    sequences: int | None = None,
    rank_timeout: float = DEFAULT_TIMEOUT,
    facts: Mapping[str, str] | None = None,
) -> Topology:
    """Make this process one rank of an ep x tp grid and return its place in it.

    Under a launcher that started the right number of ranks (`deepspeed`, `torchrun`, `mpirun`,
    `srun`): join them. On a machine without accelerators, where the `deepspeed` launcher starts one
    rank per NUMA node: replace this process by the DeepSpeed launcher with ep·tp ranks, and say so.
    A single process with ep·tp = 1 needs no process group.

    program: how the DeepSpeed launcher runs a rank, `this_program()` by default. lanes, sequences:
    see `build_topology`. rank_timeout: seconds after which a rank that does not respond ends the
    grid. facts: what must be equal on all ranks, beside the versions of the libraries; name and
    value as the user knows them.

    Raises UserError if the number of ranks does not fit and was chosen by the user, or if the ranks
    disagree.
    """
    if ep < 1 or tp < 1:
        raise UserError(f"--ep {ep} --tp {tp}: both must be 1 or more")
    program = this_program() if program is None else program
    place = launched() or LaunchedRank()
    world, by_hand = place.world, place.world > 1 and chosen_number(place)
    if world % (ep * tp) and get_accelerator().device_name() == "cpu" and not by_hand:
        if os.environ.get(STARTED_BY_US):
            raise UserError(f"started {ep * tp} ranks, found {world}; give --ep and --tp once")
        _start_ranks_on_cpu(ep * tp, program)
    if world % (ep * tp):
        shown = " ".join(program[:2] if program[0] == "--module" else program[:1])
        start = "deepspeed --num_gpus"
        if place.by_mpi:
            start, shown = "mpirun -n", f"python {shown.replace('--module', '-m')}"
        raise UserError(
            f"--ep {ep} --tp {tp} needs {ep * tp} ranks or a multiple, {world} were started; run "
            f"{start} {ep * tp} {shown} …"
        )
    if world == 1:
        return SINGLE_PROCESS
    join_world(rank_timeout)
    check_agreement({"--ep": str(ep), "--tp": str(tp)} | library_versions() | dict(facts or {}))
    return build_topology(ep, tp, lanes, sequences)


def this_program() -> list[str]:
    """How the DeepSpeed launcher starts this program again: a script, or `--module NAME`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = [sys.argv[0]] if spec is None else ["--module", spec.name]
    return [*start, *sys.argv[1:]]


def join_world(rank_timeout: float = DEFAULT_TIMEOUT) -> None:
    """Join the ranks that a launcher started: gloo on CPUs, else the accelerator's backend.

    If this process watches the others, a rank that does not respond for `rank_timeout` seconds
    ends all of them.
    """
    watch = current_watch()
    if watch is not None:
        watch.join(rank_timeout)
    place = launched() or LaunchedRank()
    if place.by_mpi:
        os.environ |= rendezvous_environment(place)
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Ranks on one host share its cores.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_size))
        leave_out_shared_memory()
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    else:
        accelerator.set_device(place.local_rank)
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    if watch is not None and place.local_size < place.world:
        connect_hosts(watch)


def leave_out_shared_memory() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce.

    Nothing here calls it, and its segments, 66 MB per rank, stay in /dev/shm after the process
    ends. DeepSpeed looks up whether it can be compiled in a table of all its operators. The table
    is made when it is first read, by running compilers, whose files stay if the process is killed
    meanwhile. So it gets one with this entry alone, unless it has its own.
    """
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def chosen_number(place: LaunchedRank) -> bool:
    """Whether the user, not the machine, chose how many ranks were started."""
    return place.by_mpi or "TORCHELASTIC_RUN_ID" in os.environ


def _start_ranks_on_cpu(ranks: int, program: list[str]) -> None:
    """Replace this process by DeepSpeed's launcher. If several were started, rank 0 does it."""
    if watch := current_watch():
        # A rank that was given other options would wait for this one.
        watch.hand_over()
    if launched_rank():
        sys.exit(0)
    print(f"no accelerator here: starting {ranks} ranks on the CPU", file=sys.stderr, flush=True)
    started = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    environment = {k: v for k, v in os.environ.items() if k not in (*started, "MASTER_PORT")}
    environment |= {STARTED_BY_US: str(ranks), "DS_ACCELERATOR": "cpu"}
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode())
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.launch", "--quiet", "--no_local_rank"),
        *(f"--world_info={world.decode()}", "--master_addr=127.0.0.1"),
        *(f"--master_port={free_port()}", *program),
    ]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)
