"""Child processes: their time, memory and end are reported correctly."""

from __future__ import annotations

import sys
import time

import psutil
import pytest

from benchmarks.processes import MemoryWatch, differing_files, memory_of, run_watched
from tests.checkpoints.damage import mistake

MIB = 1024**2


def _python(code):
    return [sys.executable, "-c", code]


def test_memory_of_a_child_and_its_child_is_seen():
    grandchild = "import time; x = bytearray(b'1' * (150 << 20)); time.sleep(1)"
    child = (
        "import subprocess, sys, time; x = bytearray(b'1' * (80 << 20));"
        f"subprocess.run([sys.executable, '-c', {grandchild!r}])"
    )
    memory = run_watched(_python(child)).memory
    assert memory["processes"] == 2
    # The grandchild holds its memory twice for a moment.
    assert 150 * MIB < memory["one"]["anonymous"] < 340 * MIB
    assert 230 * MIB < memory["total"]["anonymous"] < 440 * MIB
    assert memory["one"]["high_water"] >= memory["one"]["anonymous"]


def test_memory_of_this_process_is_sampled_while_it_works():
    with MemoryWatch() as watch:
        before = memory_of(psutil.Process().pid)["anonymous"]
        held = bytearray(b"1" * (120 << 20))
        time.sleep(0.3)
        del held
    assert watch.samples > 3
    assert watch.one["anonymous"] >= before + 119 * MIB


def test_mapped_pages_are_not_anonymous(tmp_path):
    path = tmp_path / "mapped"
    code = (
        "import mmap, time;"
        f"f = open({str(path)!r}, 'w+b'); f.truncate(100 << 20); m = mmap.mmap(f.fileno(), 0);"
        "[m.write(b'1' * (1 << 20)) for _ in range(100)]; time.sleep(0.5)"
    )
    memory = run_watched(_python(code)).memory["total"]
    assert memory["file"] + memory["shared"] > 100 * MIB
    assert memory["anonymous"] < 50 * MIB


def test_memory_of_a_process_that_is_gone_is_empty():
    process = psutil.Popen(_python("pass"))
    process.wait()
    assert memory_of(process.pid) == {}


def test_work_counts_from_what_appears(tmp_path):
    mark = tmp_path / "mark"
    code = f"import time; time.sleep(0.5); open({str(mark)!r}, 'w'); time.sleep(0.3)"
    done = run_watched(_python(code), appears=mark)
    assert 0.2 <= done.working < done.seconds - 0.4
    assert not done.killed


def test_killing_takes_descendants_down(tmp_path):
    mark = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 100 & echo $! > {mark}.new; mv {mark}.new {mark}; wait"]
    done = run_watched(command, appears=mark, kill_after=0.1)
    assert done.killed and done.seconds < 50
    assert not psutil.pid_exists(int(mark.read_text()))


def test_command_that_ends_before_it_is_killed_is_a_mistake():
    with mistake("before it could be killed"):
        run_watched(_python("pass"), kill_after=60)


def test_failure_is_reported_with_its_last_line():
    with mistake("a reason"):
        run_watched(_python("import sys; sys.exit('first\\na reason')"))


@pytest.mark.parametrize("where", ["one", "other"])
def test_files_that_differ_are_named(tmp_path, where):
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        for name in ("same", "changed"):
            (folder / name).write_text(name)
    assert differing_files(tmp_path / "one", tmp_path / "other") == []
    (tmp_path / where / "changed").write_text("CHANGED")
    (tmp_path / where / "more").write_text("")
    assert differing_files(tmp_path / "one", tmp_path / "other") == ["changed", "more"]
