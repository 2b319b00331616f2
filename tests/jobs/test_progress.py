"""The progress bar of a phase."""

from __future__ import annotations

import sys

import pytest

from resmoe_dist.jobs.claims import Claims
from resmoe_dist.jobs.scheduling import Schedule
from resmoe_dist.jobs.workers import SingleWorker
from tests.jobs.runs import wait_until


class _Terminal:
    """A stand-in for sys.stderr that claims to be a terminal and records what is written."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_bar_counts_the_tasks_of_all_ranks_and_of_earlier_runs(tmp_path, monkeypatch):
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    others = Claims(tmp_path)
    for task in (0, 3):
        assert others.take(f"compressing-{task}")

    def run_task(task):
        # Another rank finishes tasks 0 and 3 while this rank runs task 1.
        if task == 1:
            others.finish("compressing-0")
            others.finish("compressing-3")
            wait_until(lambda: "3/6" in terminal.text, 10)
        return task

    class TwoRanks(SingleWorker):
        def gather(self, value):
            return [{0: 0, 3: 3} | value] if isinstance(value, dict) else [value]

    schedule = Schedule(TwoRanks(), Claims(tmp_path), poll_seconds=0.01)
    schedule.run_phase("compressing", range(6), run_task, lambda task: task in (0, 4))

    first, *_, last = terminal.text.strip().split("\r")
    assert "2/6" in first
    assert "compressing: 100%" in last
    assert "6/6" in last


@pytest.mark.parametrize("rank", [0, 1])
def test_no_bar_on_other_ranks_or_without_a_terminal(tmp_path, monkeypatch, capfd, rank):
    terminal = _Terminal()
    if rank:
        monkeypatch.setattr(sys, "stderr", terminal)
    worker = SingleWorker()
    worker.rank = rank
    Schedule(worker, Claims(tmp_path)).run_phase("phase", range(3), str)
    assert terminal.text == ""
    assert capfd.readouterr().err == ""
