"""Faults of ranks under the real launcher: every process ends in time, and one line says why."""

from __future__ import annotations

import pytest

from benchmarks.fault_kinds import KINDS
from benchmarks.faults import inject
from resmoe_dist.testing.embedded import embedded_checkpoint

pytestmark = pytest.mark.slow

# The faulty rank of each kind. Others are tested without a launcher: tests/parallel, tests/runtime.
FAULTY = {"kill": 0, "stop": 0, "launcher": 0, "limit": 1, "damage": 1, "grid": 1, "values": 0}


@pytest.mark.parametrize("kind", FAULTY)
def test_a_fault_ends_all_processes_with_one_line(kind):
    model = embedded_checkpoint(2, may_join=False)
    outcome = inject(kind, FAULTY[kind], model, ranks=2, delay=4, number=9, rank_timeout=4)

    # Before ranks have joined, they get twice as long.
    assert outcome.problems(bound=30 if kind == "stop" else 20) == [], outcome


@pytest.mark.parametrize("kind", ["term", "values", "versions"])
def test_a_line_that_names_another_rank_or_cause_is_not_what_is_due(kind):
    due = {
        "term": "error: rank 1 was ended by SIGTERM",
        "values": "error: rank 1: the experts' output is not finite in "
        "model.layers.1.mlp.experts, step 2",
        "versions": "error: rank 1 disagrees with rank 0: torch is 9.9.9 on rank 1, 2.9 on rank 0; "
        "start all ranks alike",
    }

    assert [name for name, line in due.items() if KINDS[kind].expects(line, 1, 4)] == [kind]
    assert not KINDS[kind].expects(due[kind], 2, 4)
