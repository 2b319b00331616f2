"""Tasks go to ranks as they become free; a failure on one rank stops the others."""

from __future__ import annotations

import time

import pytest
import torch

from resmoe_dist.errors import UserError
from resmoe_dist.jobs.claims import Claims
from resmoe_dist.jobs.scheduling import Schedule
from resmoe_dist.jobs.workers import DeepSpeedWorkers, SingleWorker
from tests.ranks import run_on_ranks


def _run_phase(folder, run_task, tasks):
    """Run a phase on one rank; return the tasks it ran, all results, and its error, if any."""
    workers, done = DeepSpeedWorkers(), []

    def run_and_note(task):
        result = run_task(workers.rank, task)
        done.append(task)
        return result

    try:
        results = Schedule(workers, Claims(folder)).run_phase("phase", range(tasks), run_and_note)
    except (UserError, RuntimeError) as error:
        return done, None, str(error)
    return done, results, None


def _first_task_is_slow(rank, task):
    time.sleep(3 if task == 0 else 0.01)
    return task * task


def test_slow_task_on_one_rank_does_not_delay_the_others(tmp_path):
    outcomes = run_on_ranks(3, _run_phase, tmp_path, _first_task_is_slow, 60)

    (slow,) = [done for done, _, _ in outcomes if 0 in done]
    assert slow == [0]
    assert sorted(task for done, _, _ in outcomes for task in done) == list(range(60))
    for _, results, _ in outcomes:
        assert list(results.items()) == [(task, task * task) for task in range(60)]


def _rank_1_fails(rank, task):
    if rank == 1:
        raise UserError("rank 1 failed")
    time.sleep(0.1)


def test_failing_rank_stops_the_others_before_their_next_task(tmp_path):
    (tmp_path / "claims").mkdir()
    start = time.monotonic()
    outcomes = run_on_ranks(3, _run_phase, tmp_path / "claims", _rank_1_fails, 600)
    assert time.monotonic() - start < 30
    assert [error for _, _, error in outcomes] == ["rank 1 failed"] * 3
    assert max(len(done) for done, _, _ in outcomes) < 100


def _rank_1_has_a_bug(rank, task):
    if rank == 1:
        raise RuntimeError("a bug")
    time.sleep(0.1)


def _count_tasks_until_closed(folder):
    """Return how many tasks this rank ran before rank 1 failed.

    The ranks share claims but gather nothing: rank 0 learns of the failure from the claims alone.
    """
    done = []

    def run_task(task):
        _rank_1_has_a_bug(workers.rank, task)
        done.append(task)

    workers = DeepSpeedWorkers()
    alone = SingleWorker()
    alone.rank = workers.rank
    with pytest.raises((UserError, RuntimeError)):
        Schedule(alone, Claims(folder)).run_phase("phase", range(600), run_task)
    return len(done)


def test_bug_on_one_rank_stops_the_others_too(tmp_path):
    (tmp_path / "claims").mkdir()
    assert max(run_on_ranks(2, _count_tasks_until_closed, tmp_path / "claims")) < 100


def test_phases_of_one_run_do_not_share_claims(tmp_path):
    schedule = Schedule(SingleWorker(), Claims(tmp_path))
    assert schedule.run_phase("first", "ab", str.upper) == {"a": "A", "b": "B"}
    assert schedule.run_phase("second", "ab", str.title) == {"a": "A", "b": "B"}


def test_tasks_run_with_the_threads_that_were_set(tmp_path, one_thread):
    found = Schedule(SingleWorker(), Claims(tmp_path)).run_phase(
        "phase", [0], lambda task: torch.get_num_threads()
    )
    assert found == {0: 1}
