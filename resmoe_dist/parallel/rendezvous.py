"""Where the ranks of MPI and Slurm meet: they get ranks from their launcher, but no address.

`mpirun`: rank 0 chooses address and port and broadcasts them. `srun` without an MPI plugin: both
follow from the variables of the job.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

from resmoe_dist.errors import UserError, first_line
from resmoe_dist.parallel.launched import LaunchedRank

# Any of these: the MPI library can connect the ranks.
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


def rendezvous_environment(
    place: LaunchedRank, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The variables that `deepspeed.init_distributed` needs, for a rank of MPI or srun.

    Collective over the ranks of MPI. MASTER_ADDR and MASTER_PORT win if they are set. Raises
    UserError if the ranks cannot be connected.
    """
    variables = {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_SIZE": str(place.local_size),
    }
    if environment.get("MASTER_ADDR") and environment.get("MASTER_PORT"):
        return variables
    if any(environment.get(name) for name in _MPI_VARIABLES):
        address, port = _broadcast(place)
    else:
        address, port = slurm_address(environment), _slurm_port(environment)
    given = environment.get("MASTER_ADDR") or address
    return variables | {"MASTER_ADDR": given, "MASTER_PORT": str(port)}


def free_port() -> int:
    """A TCP port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def host_address() -> str:
    """An address under which other hosts reach this one."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    except OSError:
        found = []
    for entry in found:
        address = str(entry[4][0])
        if not address.startswith("127."):
            return address
    # Hosts files often give the name a loopback address; the route to anywhere knows better.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def _broadcast(place: LaunchedRank) -> tuple[str, int]:
    """Rank 0's address and a free port of it, on every rank."""
    try:
        # The import starts MPI.
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by an MPI launcher, but mpi4py cannot be loaded ({first_line(error)}); run "
            "pip install 'resmoe-dist[openmpi]', or set MASTER_ADDR and MASTER_PORT"
        ) from error
    world = MPI.COMM_WORLD
    if world.Get_size() != place.world:
        raise UserError(
            f"{place.world} ranks were started, and mpi4py connects {world.Get_size()}; use the "
            "mpirun of the MPI library that mpi4py finds, or set MASTER_ADDR and MASTER_PORT"
        )
    chosen = None
    if place.rank == 0:
        on_one_host = place.local_size == place.world
        chosen = ("127.0.0.1" if on_one_host else host_address(), free_port())
    return world.bcast(chosen, root=0)


def slurm_address(environment: Mapping[str, str]) -> str:
    """The first host of an srun step: `node[03-05,9]` starts with node03."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or ""
    found = re.match(r"([^\[,]+)(?:\[(\w+))?([^\[,\]]*)", hosts)
    if not found:
        raise UserError(
            "srun did not say which hosts run the ranks; set MASTER_ADDR and MASTER_PORT"
        )
    return found[1] + (found[2] or "")


def _slurm_port(environment: Mapping[str, str]) -> int:
    """The same port for all ranks of a step, and rarely that of another one on the host."""
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 20000 + (job * 31 + step) % 10000
