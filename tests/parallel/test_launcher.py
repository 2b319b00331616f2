"""Joining, starting and refusing grids, without processes; and how a process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from resmoe_dist.errors import UserError
from resmoe_dist.parallel import entry_point, launcher
from resmoe_dist.parallel.topology import SINGLE_PROCESS


class _Accelerator:
    def __init__(self, name: str) -> None:
        self._name = name

    def device_name(self) -> str:
        return self._name


@pytest.fixture
def machine(monkeypatch):
    """machine(device, world): what `start_grid` finds."""

    def pretend(device: str, world: int) -> None:
        monkeypatch.setattr(launcher, "get_accelerator", lambda: _Accelerator(device))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.delenv("RANK", raising=False)

    return pretend


def test_a_wrong_number_of_gpu_ranks_is_refused_with_the_right_command(machine):
    machine("cuda", 3)

    with pytest.raises(UserError, match=r"needs 8 ranks .* 3 were .* deepspeed --num_gpus 8"):
        launcher.start_grid(4, 2, ["launch/infer.py"])


def test_a_single_gpu_is_refused_a_larger_grid(machine):
    machine("cuda", 1)

    with pytest.raises(UserError, match="1 were started"):
        launcher.start_grid(2, 1, ["launch/infer.py"])


def test_one_process_alone_needs_no_process_group(machine):
    machine("cpu", 1)

    assert launcher.start_grid(1, 1, ["launch/infer.py"]) == SINGLE_PROCESS


def test_on_a_cpu_the_deepspeed_launcher_replaces_the_process(machine, monkeypatch):
    machine("cpu", 1)
    replaced = []
    monkeypatch.setattr(launcher.os, "execve", lambda *call: replaced.append(call))

    with pytest.raises(UserError):  # execve does not return; here it did
        launcher.start_grid(4, 2, ["launch/infer.py", "--ep", "4", "--tp", "2"])

    ((_, command, environment),) = replaced
    assert "deepspeed.launcher.launch" in command
    assert command[-5:] == ["launch/infer.py", "--ep", "4", "--tp", "2"]
    assert "WORLD_SIZE" not in environment


def test_ranks_that_were_started_for_another_grid_do_not_start_more(machine, monkeypatch):
    machine("cpu", 2)
    monkeypatch.setenv(launcher.STARTED_BY_US, "4")

    with pytest.raises(UserError, match="started 4 ranks, found 2"):
        launcher.start_grid(4, 1, ["launch/infer.py"])


@pytest.mark.parametrize(("ep", "tp"), [(0, 1), (1, 0), (-2, 1)])
def test_a_grid_has_at_least_one_rank_each_way(machine, ep, tp):
    machine("cpu", 1)

    with pytest.raises(UserError, match="must be 1 or more"):
        launcher.start_grid(ep, tp, ["launch/infer.py"])


# What a process does until a signal comes: nothing, in Python and in code that no signal ends.
WAITS = {
    "python": "time.sleep(30)",
    "compiled code": (
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM}); "
        "ctypes.CDLL(None).usleep(30_000_000)"
    ),
}


def _start(body, *, ignored=False):
    """A process that runs `body` as an entry point, and has begun it."""
    script = (
        "import ctypes, signal, time\n"
        "from resmoe_dist.parallel.entry_point import run_entry_point\n"
        f"def main():\n    print('begun', flush=True)\n    {body}\n"
        "run_entry_point(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("wait", WAITS)
def test_signal_ends_a_process_soon_and_quietly_whatever_it_does(wait, number, code):
    process = _start(WAITS[wait])
    begun = time.monotonic()
    process.send_signal(number)
    # A launcher often sends one more to a rank that leaves, when it has noticed.
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)

    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == code
    assert time.monotonic() - begun < 5


@pytest.mark.slow
def test_interrupted_work_may_say_a_word():
    process = _start(
        "try: time.sleep(30)\n    except KeyboardInterrupt: raise KeyboardInterrupt('gone on at 7')"
    )
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("", "gone on at 7\n")
    assert process.returncode == 143


@pytest.mark.slow
def test_signal_that_is_ignored_stays_ignored():
    process = _start("time.sleep(1); return 7", ignored=True)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 7


def test_entry_point_leaves_signals_as_they_were():
    before = [signal.getsignal(number) for number in entry_point.INTERRUPTS]
    with pytest.raises(SystemExit):
        entry_point.run_entry_point(lambda: 0)
    assert [signal.getsignal(number) for number in entry_point.INTERRUPTS] == before
    assert signal.set_wakeup_fd(-1) == -1
