"""Compress runs on several ranks write the files of a single process, or all fail alike."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import time

import pytest

from resmoe_dist.errors import UserError
from resmoe_dist.jobs.workers import DeepSpeedWorkers, find_workers
from resmoe_dist.parallel.rendezvous import free_port
from tests.checkpoints.damage import copy_of, edit_tensors, names_in
from tests.jobs.runs import (
    COMMAND_OPTIONS,
    before_each_task,
    contents,
    finish_command,
    finished_in,
    run,
    staging_of,
    start_command,
)
from tests.ranks import RankError, run_on_ranks

DAMAGED_TENSOR = "model.layers.0.block_sparse_moe.experts.3.w1.weight"


def _with_nan(source, target):
    """Copy a source with a NaN in layer 0, group 1; return the path of the damaged shard."""
    copy_of(source, target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shard = target / index["weight_map"][DAMAGED_TENSOR]
    edit_tensors(shard, lambda tensors: tensors[DAMAGED_TENSOR][0, 0].fill_(math.nan))
    return shard


def _run_command(*command):
    return finish_command(start_command(*command))


def _error_lines(stderr):
    return [line for line in stderr.splitlines() if line.startswith("error:")]


# Under launchers


@pytest.mark.slow
def test_mpirun_writes_the_bytes_of_one_process(sharded_source, expected, tmp_path):
    code, out, err = _run_command(
        *("mpirun", "-n", 2, "python", "launch/compress.py", sharded_source, tmp_path / "c"),
        *COMMAND_OPTIONS,
    )
    assert code == 0, err
    assert out.count("all experts") == 1  # one rank reports
    assert contents(tmp_path / "c") == expected
    assert names_in(tmp_path) == {"c"}


@pytest.mark.slow
def test_mpirun_prints_one_line_when_a_rank_fails(sharded_source, tmp_path):
    shard = _with_nan(sharded_source, tmp_path / "source")
    code, _, err = _run_command(
        *("mpirun", "-n", 2, "python", "launch/compress.py", shard.parent, tmp_path / "c"),
        *COMMAND_OPTIONS,
    )
    assert code == 2
    (line,) = _error_lines(err)
    assert f"{shard}: tensor '{DAMAGED_TENSOR}' holds NaN" in line
    assert "Traceback" not in err
    assert names_in(tmp_path) == {"source"}


@pytest.mark.slow
def test_deepspeed_writes_the_bytes_of_one_process(sharded_source, expected, tmp_path):
    code, out, err = _run_command(
        *("deepspeed", "--num_gpus", 2, "--master_port", free_port(), "launch/compress.py"),
        *(sharded_source, tmp_path / "c", *COMMAND_OPTIONS),
    )
    assert code == 0, err
    assert out.count("all experts") == 1
    assert contents(tmp_path / "c") == expected


# On gloo ranks without a launcher


def _compress_on_rank(source, output, resume=False):
    """Run one rank of a compression; return its error message, if any, and the seconds it took."""
    workers = find_workers()
    assert isinstance(workers, DeepSpeedWorkers)
    begun = time.monotonic()
    try:
        run(source, output, workers, resume=resume)
    except UserError as error:
        return str(error), time.monotonic() - begun
    return None, time.monotonic() - begun


@pytest.mark.parametrize("ranks", [2, 3, 8])  # eight ranks are more than the six tasks
def test_any_number_of_ranks_writes_the_bytes_of_one_process(
    sharded_source, expected, tmp_path, ranks
):
    outcomes = run_on_ranks(ranks, _compress_on_rank, sharded_source, tmp_path / "c")

    assert [error for error, _ in outcomes] == [None] * ranks
    assert contents(tmp_path / "c") == expected
    assert names_in(tmp_path) == {"c"}


def _die_on_rank_1(source, output):
    """Compress, but rank 1 gets SIGKILL when it takes its second task."""
    started = []

    def die(workers):
        started.append(workers)
        if workers.rank == 1 and len(started) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)

    before_each_task(pytest.MonkeyPatch(), die)
    return _compress_on_rank(source, output)


def test_two_ranks_resume_after_one_was_killed(sharded_source, expected, tmp_path):
    with pytest.raises(RankError, match="rank 1 died with exit code -9"):
        run_on_ranks(2, _die_on_rank_1, sharded_source, tmp_path / "c")
    folder = staging_of(tmp_path / "c") / "model"
    before = {name: (folder / name).stat() for name in finished_in(tmp_path / "c")}
    assert 0 < len(before) < 6

    outcomes = run_on_ranks(2, _compress_on_rank, sharded_source, tmp_path / "c", True)

    assert [error for error, _ in outcomes] == [None, None]
    assert contents(tmp_path / "c") == expected
    for name, stat in before.items():
        now = (tmp_path / "c" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_failure_of_one_rank_is_raised_on_all_and_leaves_nothing(sharded_source, tmp_path):
    shard = _with_nan(sharded_source, tmp_path / "source")

    outcomes = run_on_ranks(3, _compress_on_rank, shard.parent, tmp_path / "c")

    errors = {error for error, _ in outcomes}
    assert len(errors) == 1
    assert re.search(f"tensor '{re.escape(DAMAGED_TENSOR)}' holds NaN", errors.pop())
    assert max(seconds for _, seconds in outcomes) < 30
    assert names_in(tmp_path) == {"source"}


def _compress_on_full_disk(source, output):
    """Compress, but on every rank the disk is full at its third file."""
    replace, written = os.replace, []

    def fail_at_third(first, second):
        written.append(second)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(first, second)

    os.replace = fail_at_third
    return _compress_on_rank(source, output)


def test_full_disk_is_raised_on_all_ranks_and_keeps_finished_work(
    sharded_source, expected, tmp_path
):
    outcomes = run_on_ranks(2, _compress_on_full_disk, sharded_source, tmp_path / "c")

    (error,) = {error for error, _ in outcomes}
    assert error.endswith(
        "is full; free some space and run again; finished work is kept, run again with --resume"
    )
    run_on_ranks(2, _compress_on_rank, sharded_source, tmp_path / "c", True)
    assert contents(tmp_path / "c") == expected


def test_existing_output_is_refused_on_all_ranks(sharded_source, tmp_path):
    (tmp_path / "c").mkdir()
    outcomes = run_on_ranks(2, _compress_on_rank, sharded_source, tmp_path / "c")
    assert all("exists already" in error for error, _ in outcomes)
