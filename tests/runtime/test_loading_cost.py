"""What loading costs a rank: little more memory than what stays, and its share of the files."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from resmoe_dist.heap import return_freed_memory
from resmoe_dist.parallel.topology import SINGLE_PROCESS, build_topology
from resmoe_dist.runtime.loading import load_model
from resmoe_dist.runtime.loading_cost import loading_cost
from resmoe_dist.runtime.planning import execution_for
from resmoe_dist.runtime.rank_memory import rank_memory
from resmoe_dist.testing.synthetic_model import SyntheticModel
from tests.models import compress
from tests.ranks import run_on_ranks

MIB = 1 << 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A small model and one with 144 MiB of dense experts, compressed in a cheap way."""
    made = []
    for hidden, rows in ((256, 64), (512, 3072)):
        work = tmp_path_factory.mktemp("loading")
        SyntheticModel(layers=2, hidden=hidden, rows=rows).write(work / "s")
        compress(work / "s", work / "c", keep=0.5, align="none", center="mean")
        made.append(work / "c")
    return made[0], made[1]


def _cost(folders: tuple[Path, Path], ep: int, tp: int) -> tuple[int, int, int]:
    """Peak growth, bytes read, and bytes kept, in a process that has loaded another model before.

    With one form of execution, because measuring costs for `auto` takes memory once per machine.
    """
    topology = build_topology(ep, tp) if ep * tp > 1 else SINGLE_PROCESS
    execution = execution_for("shared")
    load_model(folders[0], topology=topology, execution=execution)
    gc.collect()
    return_freed_memory()
    with loading_cost() as cost:
        model = load_model(folders[1], topology=topology, execution=execution)
    return cost.peak_bytes, cost.read_bytes, rank_memory(model).all_bytes


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux")
@pytest.mark.parametrize(("ep", "tp"), [(1, 1), (2, 2)])
def test_a_rank_needs_little_more_than_it_keeps_and_reads_its_share(folders, ep, tp):
    whole = 2 * 8 * 3 * 512 * 3072 * torch.bfloat16.itemsize
    for peak, read, kept in run_on_ranks(ep * tp, _cost, folders, ep, tp):
        assert kept > 0.4 * whole / (ep * tp)
        assert peak <= 1.2 * kept + 8 * MIB
        # Weights that are no experts are mapped; indices and code are read too.
        assert read <= kept + 2 * MIB
