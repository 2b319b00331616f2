"""Counting in the communication library, by arithmetic on real ranks."""

from __future__ import annotations

import deepspeed.comm
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_gather_tensor, all_to_all_single_autograd

from benchmarks.wire import WireCount
from tests.ranks import run_on_ranks

# 3 rows of 5 float32.
ROWS, ROW_BYTES = 3, 20


def _count() -> dict:
    """What one rank of three counts of each collective: calls and bytes."""
    rank = dist.get_rank()
    rows, found = torch.ones(ROWS, 5), {}

    def counted(name, call):
        with WireCount() as count:
            call()
        found[name] = (count.collectives, count.bytes)

    sizes = [[1, 2, 0], [0, 2, 1], [3, 0, 0]]
    given, taken = sizes[rank], [each[rank] for each in sizes]
    ragged = rows.new_empty(sum(taken), 5)
    counted("equal", lambda: deepspeed.comm.all_to_all_single(torch.empty_like(rows), rows))
    counted("ragged", lambda: dist.all_to_all_single(ragged, rows, taken, given))
    counted(
        "functional", lambda: all_to_all_single_autograd(rows, taken, given, dist.group.WORLD).sum()
    )
    counted("gather", lambda: all_gather_tensor(rows, 0, dist.group.WORLD).sum())
    counted("list", lambda: dist.all_gather([torch.empty_like(rows) for _ in range(3)], rows))
    counted("reduce", lambda: dist.all_reduce(rows.clone()))
    counted("nothing", lambda: (dist.barrier(), rows @ rows.T))
    return found


def test_collectives_and_bytes_are_those_that_leave_a_rank():
    for rank, found in enumerate(run_on_ranks(3, _count)):
        sent_rows = [2, 1, 3][rank]
        assert found == {
            "equal": (1, 2 * ROW_BYTES),
            "ragged": (1, sent_rows * ROW_BYTES),
            "functional": (1, sent_rows * ROW_BYTES),
            "gather": (1, 2 * ROWS * ROW_BYTES),
            "list": (1, 2 * ROWS * ROW_BYTES),
            "reduce": (1, 4 * ROWS * ROW_BYTES // 3),
            "nothing": (0, 0),
        }
