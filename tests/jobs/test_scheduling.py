"""The same files come out of one process and of many; who does what; and how all of them end."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import sys
import time

import pytest
import torch

from resmoe_dist.errors import UserError
from resmoe_dist.jobs import scheduling
from resmoe_dist.jobs.scheduling import (
    DeepSpeedWorkers,
    HindranceError,
    Schedule,
    SingleWorker,
    find_workers,
    together,
)
from resmoe_dist.jobs.staging import Claims
from resmoe_dist.parallel.launcher import free_port
from tests.checkpoints.damage import copy_of, edit_tensors, mistake, names_in
from tests.jobs.runs import (
    COMMAND_OPTIONS,
    before_each_task,
    contents,
    finish_command,
    finished_in,
    run,
    staging_of,
    start_command,
    wait_until,
)
from tests.ranks import run_on_ranks

HARMED = "model.layers.0.block_sparse_moe.experts.3.w1.weight"


def _harmed(source, target):
    """A copy with a NaN in the second group of the first layer."""
    copy_of(source, target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shard = target / index["weight_map"][HARMED]
    edit_tensors(shard, lambda tensors: tensors[HARMED][0, 0].fill_(math.nan))
    return shard


def _launch(*command):
    return finish_command(start_command(*command))


def _errors(stderr):
    return [line for line in stderr.splitlines() if line.startswith("error:")]


# The launchers


@pytest.mark.slow
def test_mpirun_writes_what_one_process_does(sharded_source, expected, tmp_path):
    code, out, err = _launch(
        *("mpirun", "-n", 2, "python", "launch/compress.py", sharded_source, tmp_path / "c"),
        *COMMAND_OPTIONS,
    )
    assert code == 0, err
    assert out.count("all experts") == 1  # one rank reports
    assert contents(tmp_path / "c") == expected
    assert names_in(tmp_path) == {"c"}


@pytest.mark.slow
def test_mpirun_stops_with_one_line_when_one_rank_fails(sharded_source, tmp_path):
    shard = _harmed(sharded_source, tmp_path / "source")
    code, _, err = _launch(
        *("mpirun", "-n", 2, "python", "launch/compress.py", shard.parent, tmp_path / "c"),
        *COMMAND_OPTIONS,
    )
    assert code == 2
    (line,) = _errors(err)
    assert f"{shard}: tensor '{HARMED}' holds NaN" in line
    assert "Traceback" not in err
    assert names_in(tmp_path) == {"source"}


@pytest.mark.slow
def test_deepspeed_writes_what_one_process_does(sharded_source, expected, tmp_path):
    code, out, err = _launch(
        *("deepspeed", "--num_gpus", 2, "--master_port", free_port(), "launch/compress.py"),
        *(sharded_source, tmp_path / "c", *COMMAND_OPTIONS),
    )
    assert code == 0, err
    assert out.count("all experts") == 1
    assert contents(tmp_path / "c") == expected


# Compressing on ranks


def _compress_here(source, output, resume=False):
    """One rank's part of a run: its error, if any, and how many seconds it took."""
    workers = find_workers()
    assert isinstance(workers, DeepSpeedWorkers)
    begun = time.monotonic()
    try:
        run(source, output, workers, resume=resume)
    except UserError as error:
        return str(error), time.monotonic() - begun
    return None, time.monotonic() - begun


@pytest.mark.parametrize("ranks", [2, 3, 8])  # eight ranks: more than the six tasks
def test_any_number_of_ranks_writes_what_one_process_does(
    sharded_source, expected, tmp_path, ranks
):
    outcomes = run_on_ranks(ranks, _compress_here, sharded_source, tmp_path / "c")

    assert [error for error, _ in outcomes] == [None] * ranks
    assert contents(tmp_path / "c") == expected
    assert names_in(tmp_path) == {"c"}


def _die_on_rank_1(source, output):
    """Rank 1 gets SIGKILL when it takes its second task; the others go on."""
    begun = []

    def die(compression):
        begun.append(compression)
        if compression.workers.rank == 1 and len(begun) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)

    before_each_task(pytest.MonkeyPatch(), die)
    return _compress_here(source, output)


def test_run_of_two_ranks_resumes_after_one_was_killed(sharded_source, expected, tmp_path):
    with pytest.raises(AssertionError, match="rank 1 died with exit code -9"):
        run_on_ranks(2, _die_on_rank_1, sharded_source, tmp_path / "c")
    folder = staging_of(tmp_path / "c") / "model"
    before = {name: (folder / name).stat() for name in finished_in(tmp_path / "c")}
    assert 0 < len(before) < 6

    outcomes = run_on_ranks(2, _compress_here, sharded_source, tmp_path / "c", True)

    assert [error for error, _ in outcomes] == [None, None]
    assert contents(tmp_path / "c") == expected
    for name, stat in before.items():
        now = (tmp_path / "c" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_failure_of_one_rank_is_every_ranks_and_leaves_nothing(sharded_source, tmp_path):
    shard = _harmed(sharded_source, tmp_path / "source")

    outcomes = run_on_ranks(3, _compress_here, shard.parent, tmp_path / "c")

    errors = {error for error, _ in outcomes}
    assert len(errors) == 1
    assert re.search(f"tensor '{re.escape(HARMED)}' holds NaN", errors.pop())
    assert max(seconds for _, seconds in outcomes) < 30
    assert names_in(tmp_path) == {"source"}


def _meet_a_full_disk(source, output):
    """Every rank's third file finds no room."""
    replace, written = os.replace, []

    def full(first, second):
        written.append(second)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(first, second)

    os.replace = full
    return _compress_here(source, output)


def test_full_disk_is_every_ranks_failure_and_keeps_what_is_finished(
    sharded_source, expected, tmp_path
):
    outcomes = run_on_ranks(2, _meet_a_full_disk, sharded_source, tmp_path / "c")

    (error,) = {error for error, _ in outcomes}
    assert error.endswith(
        "is full; free some space and run again; finished work is kept, run again with --resume"
    )
    run_on_ranks(2, _compress_here, sharded_source, tmp_path / "c", True)
    assert contents(tmp_path / "c") == expected


def test_output_that_exists_is_every_ranks_failure(sharded_source, tmp_path):
    (tmp_path / "c").mkdir()
    outcomes = run_on_ranks(2, _compress_here, sharded_source, tmp_path / "c")
    assert all("exists already" in error for error, _ in outcomes)


# Handing out tasks


def _hand_out(folder, do, tasks):
    """One rank's view of a phase: the tasks it did, all results, and its error, if any."""
    workers, done = DeepSpeedWorkers(), []

    def note(task):
        result = do(workers.rank, task)
        done.append(task)
        return result

    try:
        results = Schedule(workers, Claims(folder)).run_phase("phase", range(tasks), note)
    except (UserError, RuntimeError) as error:
        return done, None, str(error)
    return done, results, None


def _first_task_is_slow(rank, task):
    time.sleep(3 if task == 0 else 0.01)
    return task * task


def test_slow_task_on_one_rank_does_not_hold_up_the_others(tmp_path):
    outcomes = run_on_ranks(3, _hand_out, tmp_path, _first_task_is_slow, 60)

    (slow,) = [done for done, _, _ in outcomes if 0 in done]
    assert slow == [0]
    assert sorted(task for done, _, _ in outcomes for task in done) == list(range(60))
    for _, results, _ in outcomes:
        assert list(results.items()) == [(task, task * task) for task in range(60)]


def _rank_1_fails(rank, task):
    if rank == 1:
        raise UserError("rank 1 met a mistake")
    time.sleep(0.1)


def test_rank_that_fails_stops_the_others_before_their_next_task(tmp_path):
    (tmp_path / "claims").mkdir()
    begun = time.monotonic()
    outcomes = run_on_ranks(3, _hand_out, tmp_path / "claims", _rank_1_fails, 600)
    assert time.monotonic() - begun < 30
    assert [error for _, _, error in outcomes] == ["rank 1 met a mistake"] * 3
    assert max(len(done) for done, _, _ in outcomes) < 100


def _rank_1_has_a_bug(rank, task):
    if rank == 1:
        raise RuntimeError("a bug")
    time.sleep(0.1)


def _hand_out_until_closed(folder):
    """How many tasks rank 0 did until rank 1 failed, without meeting it again."""
    done = []

    def do(task):
        _rank_1_has_a_bug(workers.rank, task)
        done.append(task)

    workers = DeepSpeedWorkers()
    alone = SingleWorker()
    alone.rank = workers.rank
    with pytest.raises((UserError, RuntimeError)):
        Schedule(alone, Claims(folder)).run_phase("phase", range(600), do)
    return len(done)


def test_bug_on_one_rank_stops_the_others_too(tmp_path):
    (tmp_path / "claims").mkdir()
    assert max(run_on_ranks(2, _hand_out_until_closed, tmp_path / "claims")) < 100


def test_phases_of_one_run_do_not_share_claims(tmp_path):
    schedule = Schedule(SingleWorker(), Claims(tmp_path))
    assert schedule.run_phase("first", "ab", str.upper) == {"a": "A", "b": "B"}
    assert schedule.run_phase("second", "ab", str.title) == {"a": "A", "b": "B"}


# Progress


class _Terminal:
    """A standard error that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_bar_counts_the_tasks_of_all_ranks_and_begins_at_those_finished_before(
    tmp_path, monkeypatch
):
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(scheduling, "_BAR_SECONDS", 0.01)
    others = Claims(tmp_path)
    for task in (0, 3):
        assert others.take(f"compressing-{task}")

    def do(task):
        # Another rank finishes task 3 while this one is busy with task 1.
        if task == 1:
            others.finish("compressing-0")
            others.finish("compressing-3")
            wait_until(lambda: "3/6" in terminal.text, 10)
        return task

    class Others(SingleWorker):
        def gather(self, value):
            return [{0: 0, 3: 3} | value] if isinstance(value, dict) else [value]

    schedule = Schedule(Others(), Claims(tmp_path))
    schedule.run_phase("compressing", range(6), do, lambda task: task in (0, 4))

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


# Finding the workers


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE"])
def test_process_that_was_started_alone_works_alone(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert isinstance(find_workers(), SingleWorker)


def test_batch_script_is_one_process(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert isinstance(find_workers(), SingleWorker)


class _Mpi(SingleWorker):
    """An MPI world of `size` ranks, this the first, all on this host."""

    def gather(self, value):
        return [value] * self.size


def _srun(monkeypatch, known_to_mpi):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setattr(_Mpi, "size", known_to_mpi)
    monkeypatch.setattr(scheduling, "MpiWorkers", _Mpi)
    return find_workers()


def test_srun_starts_mpi_ranks(monkeypatch):
    assert isinstance(_srun(monkeypatch, 4), _Mpi)


def test_srun_processes_that_mpi_does_not_connect_are_refused(monkeypatch):
    with mistake("srun started 4 processes that MPI does not connect; run srun --mpi=pmix"):
        _srun(monkeypatch, 1)


def test_missing_mpi_library_is_one_line(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with mistake("mpi4py cannot be loaded .*; run pip install 'resmoe-dist"):
        find_workers()


# Threads


@pytest.mark.parametrize(
    ("places", "shares"),
    [
        ([("a", {0, 1, 2, 3, 4})], [5]),
        ([("a", {0, 1, 2, 3, 4})] * 2, [2, 2]),
        ([("a", {0, 1})] * 3, [1, 1, 1]),
        # Bound by their launcher to cores of their own.
        ([("a", {0, 1}), ("a", {2, 3})], [2, 2]),
        # The same core numbers on another host.
        ([("a", {0, 1}), ("b", {0, 1}), ("b", {0, 1})], [2, 1, 1]),
    ],
)
def test_ranks_share_the_cores_of_their_host(places, shares):
    places = [(host, frozenset(cores)) for host, cores in places]
    assert [scheduling._fair_share(places, rank) for rank in range(len(places))] == shares


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("variable", "threads"),
    [(None, 6), ("", 6), ("2", 2), ("3,1", 3), ("64", 6), ("0", 1), ("many", 6)],
)
def test_fewer_threads_than_cores_may_be_asked_for(monkeypatch, variable, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    find_workers()
    assert torch.get_num_threads() == threads


def test_tasks_run_with_the_threads_that_were_set(tmp_path, one_thread):
    found = Schedule(SingleWorker(), Claims(tmp_path)).run_phase(
        "phase", [0], lambda task: torch.get_num_threads()
    )
    assert found == {0: 1}


# Together


class _Ranks:
    """What every rank would say, as rank 0 hears it: its own value, then the others'."""

    rank, size = 0, 3

    def __init__(self, others):
        self._others = iter(others)

    def gather(self, value):
        return [value, *next(self._others)]


def test_together_returns_everyones_result():
    workers = _Ranks([(None, None), ("b", "c")])
    assert together(workers, lambda: "a") == ["a", "b", "c"]


def test_together_raises_another_ranks_failure():
    with mistake("disk of rank 1"):
        together(_Ranks([((UserError, "disk of rank 1"), None)]), lambda: "a")


def test_together_tells_a_hindrance_from_a_mistake():
    def meet(cause):
        def action():
            raise UserError("this") from cause

        with pytest.raises(UserError, match="this") as caught:
            together(SingleWorker(), action)
        return type(caught.value)

    assert meet(OSError("no room")) is HindranceError
    assert meet(None) is UserError
    assert meet(KeyError("x")) is UserError


def test_together_raises_this_ranks_failure_only_after_telling_the_others():
    told = []

    class Workers(SingleWorker):
        def gather(self, value):
            told.append(value)
            return [value]

    def fail():
        raise UserError("mine")

    with mistake("mine"):
        together(Workers(), fail)
    assert told == [(UserError, "mine")]


def test_together_lets_what_is_no_mistake_of_the_user_through():
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        together(SingleWorker(), fail)
