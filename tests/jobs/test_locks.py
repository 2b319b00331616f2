"""Only one run at a time works in a staging folder, however closely two of them start."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time

import pytest

from resmoe_dist.errors import UserError
from resmoe_dist.jobs.locks import FolderLock
from resmoe_dist.jobs.staging import StagingFolder
from tests.checkpoints.damage import mistake, names_in
from tests.jobs.runs import (
    IDENTITY,
    acquire_staging,
    before_each_task,
    contents,
    finished_in,
    run,
    start_process,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def _compress_slowly(source, output):
    before_each_task(pytest.MonkeyPatch(), lambda workers: time.sleep(1))
    run(source, output)


@pytest.mark.parametrize("resume", [False, True])
def test_second_run_is_refused_until_the_first_is_gone(sharded_source, expected, tmp_path, resume):
    first = start_process(_compress_slowly, sharded_source, tmp_path / "c")
    wait_until(lambda: finished_in(tmp_path / "c"))

    with mistake(
        rf"{tmp_path}/c.partial: another run is at work here \(pid {first.pid} on .+\); let it "
        "finish or choose another output folder"
    ):
        run(sharded_source, tmp_path / "c", resume=resume)
    assert first.is_alive()
    os.kill(first.pid, signal.SIGKILL)
    first.join()

    run(sharded_source, tmp_path / "c", resume=True)
    assert contents(tmp_path / "c") == expected


def _race(output, barrier, outcomes):
    folder = StagingFolder(output)
    barrier.wait()
    try:
        claims = folder.acquire(IDENTITY, resume=True)
    except UserError as error:
        outcomes.append(str(error))
        return
    if claims is None:
        outcomes.append("complete")
        return
    time.sleep(0.01)
    folder.finish()
    outcomes.append("done")


def test_one_of_several_runs_that_start_together_does_the_work(tmp_path):
    for attempt in range(30):
        output = tmp_path / f"{attempt}"
        outcomes = []
        barrier = threading.Barrier(4)
        threads = [
            threading.Thread(target=_race, args=(output, barrier, outcomes)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        others = [outcome for outcome in outcomes if outcome not in ("done", "complete")]
        assert len(outcomes) == 4
        assert outcomes.count("done") == 1
        assert all("another run is at work here" in outcome for outcome in others), others
        assert names_in(output) == set()
    assert names_in(tmp_path) == {f"{attempt}" for attempt in range(30)}


def test_run_waits_for_the_lock_of_one_that_just_made_the_folder(tmp_path, monkeypatch):
    acquire = FolderLock.acquire

    def acquire_late(self):
        time.sleep(0.2)
        return acquire(self)

    monkeypatch.setattr(FolderLock, "acquire", acquire_late)
    first = threading.Thread(target=acquire_staging, args=(tmp_path / "c",))
    first.start()
    wait_until((tmp_path / "c.partial").exists)
    with mistake("another run is at work here"):
        acquire_staging(tmp_path / "c")
    first.join()


def test_run_leaves_its_new_folder_to_a_resumed_run_that_locked_it_first(tmp_path, monkeypatch):
    acquire = FolderLock.acquire
    winners = []

    def acquire_second(self):
        if not winners:
            winners.append(StagingFolder(tmp_path / "c"))
            winners[0].acquire(IDENTITY, resume=True)
        return acquire(self)

    monkeypatch.setattr(FolderLock, "acquire", acquire_second)
    with mistake(rf"another run is at work here \(pid {os.getpid()} on"):
        acquire_staging(tmp_path / "c")
    winners[0].finish()
    assert names_in(tmp_path) == {"c"}


@pytest.mark.parametrize("resume", [False, True])
def test_output_that_appears_while_a_run_takes_the_lock_is_found(tmp_path, monkeypatch, resume):
    first, _ = acquire_staging(tmp_path / "c")
    flock = fcntl.flock

    def finish_then_flock(*args):
        if first.lock.is_held:
            first.finish()
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", finish_then_flock)
    (tmp_path / "c.partial" / "resmoe-settings.json").touch()
    assert acquire_staging(tmp_path / "c", resume=resume)[1] is None
    assert names_in(tmp_path) == {"c"}


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def unable(*args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", unable)
    folder, claims = acquire_staging(tmp_path / "c")
    assert claims is not None
    assert f"{folder.folder}: cannot be locked; start no second run on it" in caplog.text
