"""Unfinished work: what is kept, who may continue it, and one run at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
import time

import pytest

from resmoe_dist.checkpoints import tensor_files
from resmoe_dist.errors import UserError
from resmoe_dist.jobs import staging
from resmoe_dist.jobs.group import GroupCompressor
from resmoe_dist.jobs.staging import Claims, ClaimsClosedError, StagingFolder
from tests.checkpoints.damage import (
    copy_of,
    edit_json,
    edit_tensors,
    edit_text,
    mistake,
    names_in,
    truncate,
)
from tests.jobs.runs import (
    GROUP_FILES,
    before_each_task,
    contents,
    finished_in,
    run,
    staging_of,
    start_process,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"keep": 0.25, "source": "this", "producer": "us"}


def _interrupted(source, output, monkeypatch, tasks=3):
    """The staging folder of a run that Ctrl-C ended after `tasks` of four groups and two copies."""
    begun = []

    def interrupt(compression):
        if len(begun) == tasks:
            raise KeyboardInterrupt
        begun.append(compression)

    with monkeypatch.context() as patch:
        before_each_task(patch, interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"^interrupted; continue with --resume$"):
            run(source, output)
    return staging_of(output)


def _acquired(output, **options):
    """A staging folder of `SETTINGS`, locked, and its claims."""
    folder = StagingFolder(output)
    return folder, folder.acquire(SETTINGS, **{"resume": False} | options)


# Resuming


@pytest.mark.parametrize("tasks", [0, 1, 3, 4, 5])
def test_resumed_run_gives_the_bytes_of_an_uninterrupted_one(
    sharded_source, expected, tmp_path, monkeypatch, tasks
):
    _interrupted(sharded_source, tmp_path / "c", monkeypatch, tasks)
    assert names_in(tmp_path) == {"c.partial"}
    assert len(finished_in(tmp_path / "c")) == tasks

    run(sharded_source, tmp_path / "c", resume=True)

    assert contents(tmp_path / "c") == expected
    assert names_in(tmp_path) == {"c"}


def test_resumed_run_computes_only_what_is_missing(sharded_source, tmp_path, monkeypatch):
    folder = _interrupted(sharded_source, tmp_path / "c", monkeypatch) / "model"
    before = {name: (folder / name).stat() for name in GROUP_FILES[:3]}
    compressed = []
    compress = GroupCompressor.compress
    monkeypatch.setattr(
        GroupCompressor,
        "compress",
        lambda self, *args: compressed.append(args[:2]) or compress(self, *args),
    )

    run(sharded_source, tmp_path / "c", resume=True)

    assert compressed == [(1, (2, 3))]  # the experts of the last group
    for name, stat in before.items():
        now = (tmp_path / "c" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_resuming_a_finished_run_changes_nothing(sharded_source, expected, tmp_path):
    run(sharded_source, tmp_path / "c")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").iterdir()}

    run(sharded_source, tmp_path / "c", resume=True)

    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").iterdir()} == before
    assert contents(tmp_path / "c") == expected


def _compress_until_killed(source, output, writes):
    """A run that gets SIGKILL when file number `writes` is written but not yet renamed."""
    calls = []
    replace = os.replace

    def kill(first, second):
        calls.append(second)
        if len(calls) == writes:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(first, second)

    tensor_files.os.replace = kill
    run(source, output)


@pytest.mark.parametrize("writes", [1, 3, 11, 13])  # settings; a group; a companion; the index
def test_killed_run_resumes_and_leaves_no_stray_files(sharded_source, expected, tmp_path, writes):
    process = start_process(_compress_until_killed, sharded_source, tmp_path / "c", writes)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    folder = staging_of(tmp_path / "c")
    assert list(folder.rglob(".*.tmp"))
    # What safetensors itself leaves when it is killed while writing.
    if writes > 1:
        (folder / "model" / ".tmpA1b2C3").write_bytes(b"half")
        (folder / "scratch" / ".experts-1").mkdir()

    run(sharded_source, tmp_path / "c", resume=True)

    assert contents(tmp_path / "c") == expected
    assert names_in(tmp_path) == {"c"}


def test_run_that_was_killed_before_it_made_anything_resumes(sharded_source, expected, tmp_path):
    (tmp_path / "c.partial").mkdir()
    run(sharded_source, tmp_path / "c", resume=True)
    assert contents(tmp_path / "c") == expected


def test_run_that_was_killed_after_its_last_rename_is_complete(
    sharded_source, expected, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(StagingFolder, "_remove", StagingFolder.release)
        run(sharded_source, tmp_path / "c")
    assert names_in(tmp_path) == {"c", "c.partial"}

    run(sharded_source, tmp_path / "c", resume=True)

    assert contents(tmp_path / "c") == expected
    assert names_in(tmp_path) == {"c"}


def test_mistake_in_the_input_leaves_finished_work_only_to_a_resumed_run(
    sharded_source, tmp_path, monkeypatch
):
    def refuse(*args):
        raise UserError("a mistake")

    _interrupted(sharded_source, tmp_path / "c", monkeypatch)
    monkeypatch.setattr(GroupCompressor, "compress", refuse)
    with mistake("^a mistake$"):
        run(sharded_source, tmp_path / "c", resume=True)
    assert finished_in(tmp_path / "c") == set(GROUP_FILES[:3])

    with mistake("^a mistake$"):
        run(sharded_source, tmp_path / "d")
    assert names_in(tmp_path) == {"c.partial"}


def _cut(path):
    truncate(path, 500)


def _cut_header(path):
    truncate(path, 20)


def _without_record(path):
    edit_tensors(path, lambda tensors: None)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        (GROUP_FILES[1], _cut),
        (GROUP_FILES[1], _cut_header),
        (GROUP_FILES[1], _without_record),
        ("model-00001-of-00002.safetensors", _cut),
        ("model-00001-of-00002.safetensors", _cut_header),
    ],
)
def test_finished_file_that_was_damaged_since_is_made_anew(
    sharded_source, expected, tmp_path, monkeypatch, name, harm
):
    folder = _interrupted(sharded_source, tmp_path / "c", monkeypatch, tasks=5)
    harm(folder / "model" / name)

    run(sharded_source, tmp_path / "c", resume=True)

    assert contents(tmp_path / "c") == expected


# Whose work it is


def test_unfinished_run_is_not_overwritten_without_resume(sharded_source, tmp_path, monkeypatch):
    folder = _interrupted(sharded_source, tmp_path / "c", monkeypatch)
    before = contents(folder)
    with mistake(f"{folder}: an unfinished run is here; continue it with --resume or remove it"):
        run(sharded_source, tmp_path / "c")
    assert contents(folder) == before


@pytest.mark.parametrize(
    "change",
    [{"keep": 0.5}, {"groups": 1}, {"codec": "low_rank"}, {"layers": [1]}, {"dtype": "bfloat16"}],
)
@pytest.mark.parametrize("finished", [False, True])
def test_resume_with_other_options_is_refused(
    sharded_source, tmp_path, monkeypatch, change, finished
):
    if finished:
        run(sharded_source, tmp_path / "c")
        folder = tmp_path / "c"
    else:
        folder = _interrupted(sharded_source, tmp_path / "c", monkeypatch)
    before = contents(folder)
    with mistake(f"{folder}: .*other options"):
        run(sharded_source, tmp_path / "c", resume=True, **change)
    assert contents(folder) == before


def test_resume_with_another_source_is_refused(sharded_source, tmp_path, monkeypatch):
    folder = _interrupted(sharded_source, tmp_path / "c", monkeypatch)
    other = copy_of(sharded_source, tmp_path / "other")
    edit_json(other / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    with mistake(f"{folder}: the unfinished run read another source, or this one before"):
        run(other, tmp_path / "c", resume=True)


def test_source_that_was_moved_is_the_same_source(sharded_source, expected, tmp_path, monkeypatch):
    source = copy_of(sharded_source, tmp_path / "source")
    _interrupted(source, tmp_path / "c", monkeypatch)
    source.rename(tmp_path / "moved")

    run(tmp_path / "moved", tmp_path / "c", resume=True)

    assert contents(tmp_path / "c") == expected


def test_resume_of_another_versions_work_is_refused(tmp_path):
    folder, _ = _acquired(tmp_path / "c")
    folder.release()
    with mistake("c.partial: the unfinished run was another version's; remove it to start anew"):
        StagingFolder(tmp_path / "c").acquire(SETTINGS | {"producer": "them"}, resume=True)


@pytest.mark.parametrize("text", [None, "{cut", "[]"])
def test_resume_of_a_folder_that_is_no_unfinished_run_is_refused(sharded_source, tmp_path, text):
    folder = tmp_path / "c.partial"
    folder.mkdir()
    (folder / "precious").touch()
    if text:
        edit_text(folder / "resmoe-settings.json", text)
    with mistake(f"{folder}: the unfinished run had other options; remove it to start anew"):
        run(sharded_source, tmp_path / "c", resume=True)
    assert "precious" in names_in(folder)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_what_is_no_folder_is_left_alone(tmp_path, kind, resume):
    partial = tmp_path / "c.partial"
    if kind == "file":
        partial.write_text("precious")
    else:
        partial.symlink_to("nowhere")
    with mistake(f"{partial}: (an|the) unfinished run"):
        _acquired(tmp_path / "c", resume=resume)
    assert names_in(tmp_path) == {"c.partial"}


# One run at a time


def _compress_slowly(source, output):
    before_each_task(pytest.MonkeyPatch(), lambda compression: time.sleep(1))
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
        claims = folder.acquire(SETTINGS, resume=True)
    except UserError as error:
        outcomes.append(str(error))
        return
    if claims is None:
        outcomes.append("complete")
        return
    time.sleep(0.01)
    folder.finish()
    outcomes.append("done")


def test_of_runs_that_start_together_one_does_the_work(tmp_path):
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


def test_run_that_starts_while_another_makes_its_folder_sees_that_one(tmp_path, monkeypatch):
    lock = StagingFolder._acquire_lock

    def lock_late(self):
        time.sleep(0.2)
        return lock(self)

    monkeypatch.setattr(StagingFolder, "_acquire_lock", lock_late)
    first = threading.Thread(target=_acquired, args=(tmp_path / "c",))
    first.start()
    wait_until((tmp_path / "c.partial").exists)
    with mistake("another run is at work here"):
        _acquired(tmp_path / "c")
    first.join()


def test_run_that_loses_its_new_folder_to_a_resumed_one_leaves_it_alone(tmp_path, monkeypatch):
    lock = StagingFolder._acquire_lock
    winners = []

    def lock_second(self):
        if not winners:
            winners.append(StagingFolder(tmp_path / "c"))
            winners[0].acquire(SETTINGS, resume=True)
        return lock(self)

    monkeypatch.setattr(StagingFolder, "_acquire_lock", lock_second)
    with mistake(rf"another run is at work here \(pid {os.getpid()} on"):
        _acquired(tmp_path / "c")
    winners[0].finish()
    assert names_in(tmp_path) == {"c"}


@pytest.mark.parametrize("resume", [False, True])
def test_run_that_waits_at_the_lock_of_one_that_finishes_finds_the_output(
    tmp_path, monkeypatch, resume
):
    first, _ = _acquired(tmp_path / "c")
    flock = fcntl.flock

    def finish_before(*args):
        if first._lock is not None:
            first.finish()
        flock(*args)

    monkeypatch.setattr(staging.fcntl, "flock", finish_before)
    (tmp_path / "c.partial" / "resmoe-settings.json").touch()
    assert _acquired(tmp_path / "c", resume=resume)[1] is None
    assert names_in(tmp_path) == {"c"}


def test_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def unable(*args):
        raise OSError(staging.errno.ENOLCK, "no locks")

    monkeypatch.setattr(staging.fcntl, "flock", unable)
    folder, claims = _acquired(tmp_path / "c")
    assert claims is not None
    assert f"{folder.folder}: cannot be locked; start no second run on it" in caplog.text


# Claims


def test_task_is_taken_once(tmp_path):
    claims = Claims(tmp_path)
    assert claims.take("a-0")
    assert not claims.take("a-0")
    claims.finish("a-0")
    assert not Claims(tmp_path).take("a-0")
    assert claims.take("a-1")
    assert claims.take("b-0")
    claims.finish("b-0")
    assert claims.finished("a-") == {"a-0"}


def test_closed_claims_are_closed_to_everyone_and_closed_once(tmp_path):
    (tmp_path / "claims").mkdir()
    claims, others = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    assert others.take("a-0")
    assert claims.close()
    assert not others.close()
    with pytest.raises(ClaimsClosedError):
        others.take("a-1")
    others.finish("a-0")
    assert others.finished("a-") == set()


def test_claims_of_a_killed_run_neither_hold_nor_follow_the_next_one(tmp_path):
    folder, killed = _acquired(tmp_path / "c")
    assert killed.take("compressing-0")
    folder.release()

    folder, claims = _acquired(tmp_path / "c", resume=True)

    assert len(list(folder.folder.glob("claims-*"))) == 1
    assert claims.take("compressing-0")
    # A rank that outlived its run takes nothing from this one.
    with pytest.raises(ClaimsClosedError):
        killed.take("compressing-1")


def test_run_whose_claims_are_gone_says_so(sharded_source, tmp_path, monkeypatch):
    def take_over(_):
        for claims in (tmp_path / "c.partial").glob("claims-*"):
            shutil.rmtree(claims)

    before_each_task(monkeypatch, take_over)
    with mistake(f"{tmp_path}/c.partial: was removed or taken over while this run was on"):
        run(sharded_source, tmp_path / "c")


def test_scratch_is_kept_for_a_resumed_run_and_never_reaches_the_output(tmp_path):
    folder, _ = _acquired(tmp_path / "c")
    (folder.scratch / "note").touch()
    assert folder.give_up(keep=True)

    folder, _ = _acquired(tmp_path / "c", resume=True)
    assert names_in(folder.scratch) == {"note"}
    folder.finish()
    assert names_in(tmp_path / "c") == set()
    assert names_in(tmp_path) == {"c"}
