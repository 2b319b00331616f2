"""Signals to a run, its ranks or their launcher: one line, an exit code, and a run that resumes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from resmoe_dist.parallel.rendezvous import free_port
from tests.jobs.runs import (
    COMMAND_OPTIONS,
    SLOW_COMPRESS,
    contents,
    end_command,
    finish_command,
    finished_in,
    run,
    staging_of,
    start_command,
    wait_until,
)

MPIRUN = ("mpirun", "-n", 2, "python")
MESSAGE = "interrupted; continue with --resume"


@pytest.fixture
def start_slow(tmp_path, monkeypatch):
    """start_slow(source, *launcher, pause): start a run that pauses before each task, in ms."""
    started = []
    (tmp_path / "pids").mkdir()
    monkeypatch.setenv("RESMOE_TEST_PIDS", str(tmp_path / "pids"))

    def start(source, *launcher, pause=1000, resume=()):
        monkeypatch.setenv("RESMOE_TEST_PAUSE", str(pause))
        command = (
            *(launcher or ["python"]),
            SLOW_COMPRESS,
            source,
            tmp_path / "c",
            *COMMAND_OPTIONS,
        )
        started.append(start_command(*command, *resume))
        return started[-1]

    yield start
    for process in started:
        end_command(process)


def _pid(tmp_path, rank):
    file = tmp_path / "pids" / str(rank)
    wait_until(lambda: file.exists() and file.read_text())  # may be empty while it is written
    return int(file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_ends_at_once_and_says_how_to_resume(
    sharded_source, expected, tmp_path, start_slow, number, code
):
    process = start_slow(sharded_source, pause=2000)
    wait_until(lambda: finished_in(tmp_path / "c"))
    # Now the task is in its pause, which a run that waited for compiled code would sit out.
    time.sleep(0.3)
    start = time.monotonic()
    process.send_signal(number)
    assert finish_command(process) == (code, "", f"{MESSAGE}\n")
    assert time.monotonic() - start < 1.5

    run(sharded_source, tmp_path / "c", resume=True)
    assert contents(tmp_path / "c") == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "rank"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 0)]
)
def test_mpirun_ends_all_ranks_after_one_was_interrupted(
    sharded_source, expected, tmp_path, start_slow, number, code, rank
):
    process = start_slow(sharded_source, *MPIRUN)
    wait_until(lambda: finished_in(tmp_path / "c"))
    os.kill(_pid(tmp_path, rank), number)

    found, _, err = finish_command(process)
    assert found == code
    assert err.count(MESSAGE) == 1
    assert "Traceback" not in err
    wait_until(lambda: not _alive(_pid(tmp_path, 1 - rank)), 10)

    run(sharded_source, tmp_path / "c", resume=True)
    assert contents(tmp_path / "c") == expected


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed"])
def test_run_resumes_after_its_launcher_was_interrupted(
    sharded_source, expected, tmp_path, start_slow, launcher
):
    launchers = {
        "mpirun": MPIRUN,
        "deepspeed": ("deepspeed", "--num_gpus", 2, "--master_port", free_port()),
    }
    process = start_slow(sharded_source, *launchers[launcher])
    wait_until(lambda: finished_in(tmp_path / "c"))
    # A terminal sends Ctrl-C to the launcher and all processes of its group.
    os.killpg(process.pid, signal.SIGINT)

    code, _, err = finish_command(process)
    assert code != 0
    # mpirun drops all output of its ranks from here on.
    assert err.count(MESSAGE) == 1 if launcher == "deepspeed" else err == ""
    wait_until(lambda: not _alive(_pid(tmp_path, 0)) and not _alive(_pid(tmp_path, 1)), 10)
    run(sharded_source, tmp_path / "c", resume=True)
    assert contents(tmp_path / "c") == expected


@pytest.mark.slow
def test_mpirun_ranks_resume_after_one_was_killed(sharded_source, expected, tmp_path, start_slow):
    process = start_slow(sharded_source, *MPIRUN)
    wait_until(lambda: len(finished_in(tmp_path / "c")) > 1)
    os.kill(_pid(tmp_path, 0), signal.SIGKILL)
    assert finish_command(process)[0] != 0
    folder = staging_of(tmp_path / "c") / "model"
    before = {name: (folder / name).stat().st_mtime_ns for name in finished_in(tmp_path / "c")}

    process = start_slow(sharded_source, *MPIRUN, pause=0, resume=["--resume"])
    code, _, err = finish_command(process)
    assert code == 0, err
    assert contents(tmp_path / "c") == expected
    assert {n: (tmp_path / "c" / n).stat().st_mtime_ns for n in before} == before


def _alive(pid):
    return Path(f"/proc/{pid}").exists()
