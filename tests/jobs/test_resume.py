"""A resumed run continues its own unfinished work, and writes the bytes of an uninterrupted one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from resmoe_dist.errors import UserError
from resmoe_dist.jobs.group import GroupCompressor
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
    contents,
    finished_in,
    interrupt_run,
    run,
    staging_of,
    start_process,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tasks", [0, 1, 3, 4, 5])
def test_resumed_run_gives_the_bytes_of_an_uninterrupted_one(
    sharded_source, expected, tmp_path, monkeypatch, tasks
):
    interrupt_run(sharded_source, tmp_path / "c", monkeypatch, tasks)
    assert names_in(tmp_path) == {"c.partial"}
    assert len(finished_in(tmp_path / "c")) == tasks

    run(sharded_source, tmp_path / "c", resume=True)

    assert contents(tmp_path / "c") == expected
    assert names_in(tmp_path) == {"c"}


def test_resumed_run_computes_only_what_is_missing(sharded_source, tmp_path, monkeypatch):
    folder = interrupt_run(sharded_source, tmp_path / "c", monkeypatch) / "model"
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
    """Compress until SIGKILL, when file number `writes` is written but not yet renamed."""
    calls = []
    replace = os.replace

    def kill(first, second):
        calls.append(second)
        if len(calls) == writes:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(first, second)

    os.replace = kill
    run(source, output)


@pytest.mark.parametrize("writes", [1, 3, 11, 13])  # settings; a group; a companion; the index
def test_killed_run_resumes_and_leaves_no_stray_files(sharded_source, expected, tmp_path, writes):
    process = start_process(_compress_until_killed, sharded_source, tmp_path / "c", writes)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    folder = staging_of(tmp_path / "c")
    assert list(folder.rglob(".*.tmp"))
    # safetensors leaves such files when it is killed while writing.
    if writes > 1:
        (folder / "model" / ".tmpA1b2C3").write_bytes(b"half")
        (folder / "scratch" / ".experts-1").mkdir()

    run(sharded_source, tmp_path / "c", resume=True)

    assert contents(tmp_path / "c") == expected
    assert names_in(tmp_path) == {"c"}


def test_run_that_was_killed_at_its_start_resumes(sharded_source, expected, tmp_path):
    (tmp_path / "c.partial").mkdir()
    run(sharded_source, tmp_path / "c", resume=True)
    assert contents(tmp_path / "c") == expected


def _compress_until_output_exists(source, output):
    """Compress until SIGKILL, right after the rename that makes the output."""
    rename = Path.rename

    def rename_and_die(path, target):
        rename(path, target)
        os.kill(os.getpid(), signal.SIGKILL)

    Path.rename = rename_and_die
    run(source, output)


def test_run_that_was_killed_after_its_last_rename_is_complete(sharded_source, expected, tmp_path):
    process = start_process(_compress_until_output_exists, sharded_source, tmp_path / "c")
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert names_in(tmp_path) == {"c", "c.partial"}

    run(sharded_source, tmp_path / "c", resume=True)

    assert contents(tmp_path / "c") == expected
    assert names_in(tmp_path) == {"c"}


def test_user_error_removes_finished_work_unless_the_run_was_resumed(
    sharded_source, tmp_path, monkeypatch
):
    def refuse(*args):
        raise UserError("a mistake")

    interrupt_run(sharded_source, tmp_path / "c", monkeypatch)
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
def test_damaged_finished_file_is_made_again(
    sharded_source, expected, tmp_path, monkeypatch, name, harm
):
    folder = interrupt_run(sharded_source, tmp_path / "c", monkeypatch, tasks=5)
    harm(folder / "model" / name)

    run(sharded_source, tmp_path / "c", resume=True)

    assert contents(tmp_path / "c") == expected


# Work of another run


def test_unfinished_run_is_not_overwritten_without_resume(sharded_source, tmp_path, monkeypatch):
    folder = interrupt_run(sharded_source, tmp_path / "c", monkeypatch)
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
        folder = interrupt_run(sharded_source, tmp_path / "c", monkeypatch)
    before = contents(folder)
    with mistake(f"{folder}: .*other options"):
        run(sharded_source, tmp_path / "c", resume=True, **change)
    assert contents(folder) == before


def test_resume_with_another_source_is_refused(sharded_source, tmp_path, monkeypatch):
    folder = interrupt_run(sharded_source, tmp_path / "c", monkeypatch)
    other = copy_of(sharded_source, tmp_path / "other")
    edit_json(other / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    with mistake(f"{folder}: the unfinished run read another source, or this one before"):
        run(other, tmp_path / "c", resume=True)


def test_moved_source_is_the_same_source(sharded_source, expected, tmp_path, monkeypatch):
    source = copy_of(sharded_source, tmp_path / "source")
    interrupt_run(source, tmp_path / "c", monkeypatch)
    source.rename(tmp_path / "moved")

    run(tmp_path / "moved", tmp_path / "c", resume=True)

    assert contents(tmp_path / "c") == expected


@pytest.mark.parametrize("text", [None, "{cut", "[]"])
def test_resume_of_an_unrelated_folder_is_refused(sharded_source, tmp_path, text):
    folder = tmp_path / "c.partial"
    folder.mkdir()
    (folder / "precious").touch()
    if text:
        edit_text(folder / "resmoe-settings.json", text)
    with mistake(f"{folder}: the unfinished run had other options; remove it to start anew"):
        run(sharded_source, tmp_path / "c", resume=True)
    assert "precious" in names_in(folder)
