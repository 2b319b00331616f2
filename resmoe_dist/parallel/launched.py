"""What a launcher told this process through the environment: its rank, the world, its host's share.

Understood: the `deepspeed` launcher and torchrun, Open MPI, MPICH and its relatives, and srun.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

# Variables of rank, world size, local rank and local size; the first complete row counts.
# SLURM_STEP_NUM_TASKS is set by srun only: a batch script, a single process, has SLURM_NTASKS.
_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")),
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",)),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ("SLURM_STEP_TASKS_PER_NODE",)),
)
# What tells the ranks of one launch on one host from those of another.
_LAUNCH_VARIABLES = (
    *("MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "GROUP_RANK", "TORCHELASTIC_RUN_ID"),
    *("PMIX_NAMESPACE", "SLURM_JOB_ID", "SLURM_STEP_ID"),
)


@dataclass(frozen=True)
class LaunchedRank:
    """One process of a launch.

    world: number of processes on all hosts. local_rank, local_size: among those of this host.
    by_mpi: the variables are those of MPI or srun, which set no rendezvous address.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_size: int = 1
    by_mpi: bool = False


def launched(environment: Mapping[str, str] = os.environ) -> LaunchedRank | None:
    """This process as its launcher described it; None if no launcher started it.

    A launcher that does not tell the local size has started all ranks on this host.
    """
    for rank, world, local_rank, local_sizes in _VARIABLES:
        # A rank and no world is torch's way to say nothing; mpirun -n 1 is a launcher all the same.
        if not environment.get(rank) or not environment.get(world):
            continue
        size = int(environment[world])
        local = next((environment[name] for name in local_sizes if environment.get(name)), "")
        return LaunchedRank(
            rank=int(environment[rank]),
            world=size,
            local_rank=int(environment.get(local_rank) or environment[rank]),
            local_size=_tasks_here(local, environment) if local else size,
            by_mpi=rank != "RANK",
        )
    return None


def launch_key(environment: Mapping[str, str] = os.environ) -> str:
    """Equal for the ranks of one launch on one host, whatever their order."""
    return "/".join(environment.get(name, "") for name in _LAUNCH_VARIABLES)


def _tasks_here(text: str, environment: Mapping[str, str]) -> int:
    """A local size: a number, or srun's list for all hosts such as `4(x2),3`."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, repeats = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(repeats or 1)
    return counts[int(environment.get("SLURM_NODEID", "0")) if len(counts) > 1 else 0]
