"""Cores of a rank: `mpirun` binds ranks to fewer than their share of the host."""

from __future__ import annotations

import os
from contextlib import suppress

from resmoe_dist.parallel.launched import LaunchedRank
from resmoe_dist.parallel.processes import launchers_above


def widen_affinity(place: LaunchedRank) -> None:
    """Let a rank of MPI run on all cores that its launcher may use, if it has less than its share.

    A binding that gives each rank its share is kept. Call it before threads start: they inherit.
    """
    launchers = launchers_above()
    if not place.by_mpi or not launchers:
        return
    with suppress(OSError):
        allowed = os.sched_getaffinity(launchers[0].pid)
        if len(os.sched_getaffinity(0)) < len(allowed) // place.local_size:
            os.sched_setaffinity(0, allowed)
