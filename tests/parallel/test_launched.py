"""What launchers say in the environment, and where ranks without an address meet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resmoe_dist.errors import UserError
from resmoe_dist.parallel.launched import LaunchedRank, launched
from resmoe_dist.parallel.rendezvous import rendezvous_environment, slurm_address

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "1234",
}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (DEEPSPEED, LaunchedRank(5, 8, 1, 4)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            LaunchedRank(5, 8, 1, 4),
        ),
        (OPEN_MPI, LaunchedRank(5, 8, 1, 4, by_mpi=True)),
        (SRUN, LaunchedRank(5, 7, 1, 3, by_mpi=True)),
        (
            SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NUM_TASKS": "8"},
            LaunchedRank(5, 8, 1, 4, by_mpi=True),
        ),
        # A batch script is a single process, whatever it starts later.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        ({"RANK": "0"}, None),
        ({}, None),
        # The `deepspeed` launcher in a batch job or under mpirun.
        (SRUN | OPEN_MPI | DEEPSPEED, LaunchedRank(5, 8, 1, 4)),
    ],
)
def test_rank_world_and_the_share_of_a_host(environment, expected):
    assert launched(environment) == expected


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("node[03-05,9]", "node03"),
        ("a1,b2", "a1"),
        ("a[1,3],b2", "a1"),
        ("login-1.site", "login-1.site"),
    ],
)
def test_the_first_host_of_a_step(hosts, first):
    assert slurm_address({"SLURM_STEP_NODELIST": hosts}) == first


def test_ranks_of_srun_meet_at_the_first_host():
    place = launched(SRUN)

    found = rendezvous_environment(place, SRUN)

    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "3",
        "MASTER_ADDR": "gpu03",
    }
    assert 1024 < port < 32768
    assert rendezvous_environment(place, SRUN | {"SLURM_JOB_ID": "1235"})["MASTER_PORT"] != str(
        port
    )


def test_a_given_address_is_kept():
    given = SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}

    found = rendezvous_environment(launched(SRUN), given)

    assert "MASTER_ADDR" not in found and "MASTER_PORT" not in found


def test_an_unknown_first_host_is_refused():
    with pytest.raises(UserError, match="set MASTER_ADDR and MASTER_PORT"):
        slurm_address({})


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize(("local_size", "widened"), [(1, True), (2, False)])
def test_a_rank_of_mpi_gets_its_share_of_the_cores(tmp_path, local_size, widened):
    cores = sorted(os.sched_getaffinity(0))[:2]
    rank = (
        "import os\n"
        "from resmoe_dist.parallel.affinity import widen_affinity\n"
        "from resmoe_dist.parallel.launched import LaunchedRank\n"
        f"widen_affinity(LaunchedRank(0, 2, 0, {local_size}, by_mpi=True))\n"
        "print(sorted(os.sched_getaffinity(0)))\n"
    )
    # Launchers are known by name.
    launcher = tmp_path / "mpirun"
    launcher.write_text(
        "import os, subprocess, sys\n"
        f"os.sched_setaffinity(0, {cores})\n"
        f"bind = lambda: os.sched_setaffinity(0, {cores[:1]})\n"
        f"subprocess.run([sys.executable, '-c', {rank!r}], preexec_fn=bind, check=True)\n"
    )
    root = str(Path(__file__).parents[2])
    printed = subprocess.run(
        [sys.executable, launcher],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert printed.strip() == str(cores if widened else cores[:1])
