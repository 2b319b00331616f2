"""Finding the processes of a run, sharing the host's cores, and gathering results."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from resmoe_dist.errors import UserError
from resmoe_dist.jobs import workers as workers_module
from resmoe_dist.jobs.workers import (
    RetryableError,
    SingleWorker,
    fair_threads,
    find_workers,
    gather_or_raise,
)
from tests.checkpoints.damage import mistake

# Finding workers


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE"])
def test_size_of_one_in_the_environment_is_a_single_worker(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert isinstance(find_workers(), SingleWorker)


def test_slurm_batch_script_is_a_single_worker(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert isinstance(find_workers(), SingleWorker)


class _Mpi(SingleWorker):
    """Rank 0 of an MPI world of `size` ranks on this host."""

    def gather(self, value):
        return [value] * self.size


def _find_under_srun(monkeypatch, mpi_size):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setattr(_Mpi, "size", mpi_size)
    monkeypatch.setattr(workers_module, "MpiWorkers", _Mpi)
    return find_workers()


def test_srun_processes_are_mpi_workers(monkeypatch):
    assert isinstance(_find_under_srun(monkeypatch, 4), _Mpi)


def test_srun_without_mpi_is_refused(monkeypatch):
    with mistake("srun started 4 processes that MPI does not connect; run srun --mpi=pmix"):
        _find_under_srun(monkeypatch, 1)


def test_missing_mpi_library_is_a_user_error(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with mistake("mpi4py cannot be loaded .*; run pip install 'resmoe-dist"):
        find_workers()


# Threads


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([("a", {0, 1, 2, 3, 4})], [5]),
        ([("a", {0, 1, 2, 3, 4})] * 2, [2, 2]),
        ([("a", {0, 1})] * 3, [1, 1, 1]),
        # Each rank bound to different cores.
        ([("a", {0, 1}), ("a", {2, 3})], [2, 2]),
        # The same core numbers on another host.
        ([("a", {0, 1}), ("b", {0, 1}), ("b", {0, 1})], [2, 1, 1]),
    ],
)
def test_ranks_share_the_cores_of_their_host(places, expected):
    places = [(host, frozenset(cores)) for host, cores in places]
    assert [fair_threads(places, rank) for rank in range(len(places))] == expected


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("variable", "threads"),
    [(None, 6), ("", 6), ("2", 2), ("3,1", 3), ("64", 6), ("0", 1), ("many", 6)],
)
def test_omp_num_threads_limits_threads(monkeypatch, variable, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    find_workers()
    assert torch.get_num_threads() == threads


# Gathering


class _Ranks:
    """Rank 0 of three: `others` holds what the other two ranks give to each gather."""

    rank, size = 0, 3

    def __init__(self, others):
        self._others = iter(others)

    def gather(self, value):
        return [value, *next(self._others)]


def test_results_of_all_ranks_are_returned():
    workers = _Ranks([(None, None), ("b", "c")])
    assert gather_or_raise(workers, lambda: "a") == ["a", "b", "c"]


def test_failure_of_another_rank_is_raised():
    with mistake("disk of rank 1"):
        gather_or_raise(_Ranks([((UserError, "disk of rank 1"), None)]), lambda: "a")


def test_failure_of_the_system_is_retryable():
    def type_raised_from(cause):
        def action():
            raise UserError("this") from cause

        with pytest.raises(UserError, match="this") as caught:
            gather_or_raise(SingleWorker(), action)
        return type(caught.value)

    assert type_raised_from(OSError("no room")) is RetryableError
    assert type_raised_from(None) is UserError
    assert type_raised_from(KeyError("x")) is UserError


def test_failure_reaches_the_other_ranks_before_it_is_raised():
    sent = []

    class RecordingWorker(SingleWorker):
        def gather(self, value):
            sent.append(value)
            return [value]

    def fail():
        raise UserError("mine")

    with mistake("mine"):
        gather_or_raise(RecordingWorker(), fail)
    assert sent == [(UserError, "mine")]


def test_other_exceptions_are_not_caught():
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        gather_or_raise(SingleWorker(), fail)
