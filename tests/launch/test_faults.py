"""Faults of ranks under the real launcher: every process ends in time, and one line says why."""

from __future__ import annotations

import re

import pytest

from benchmarks.faults import inject

pytestmark = pytest.mark.slow

LINES = {
    # Without the signal if the launcher has asked first.
    "kill": "error: rank 0 (was killed by SIGKILL|ended without a message)",
    "stop": "error: rank 0 stopped responding for ",
    "launcher": "error: the launcher of rank ",
    "raise": "error: rank 1 failed: ValueError: injected fault [(]",
    "memory": "error: rank 1: out of memory [(]",
    "damage": "error: rank 3: ",
}


@pytest.mark.parametrize("kind", LINES)
def test_a_fault_ends_all_processes_with_one_line(kind, compressed):
    ranks = 4 if kind == "damage" else 2
    rank = 3 if kind == "damage" else int(kind in ("raise", "memory"))

    outcome = inject(kind, rank, compressed, ranks=ranks, delay=4, rank_timeout=4)

    (line,) = outcome.lines
    assert re.match(LINES[kind], line)
    assert outcome.code not in (0, None)
    assert (outcome.code == 2) == (kind == "damage")
    assert outcome.left == []
    assert not outcome.traceback
    # Before ranks have joined, they get twice as long.
    assert outcome.seconds < (30 if kind == "stop" else 20)
