"""Ranks that watch each other: however one ends, all end soon, and one line says why.

The ranks are bare processes, so many faults are tested in seconds. tests/launch has the same with
the real launcher and a model.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from resmoe_dist.parallel.rendezvous import free_port

REPOSITORY = Path(__file__).parents[2]
WAITS = "time.sleep(60)"
# Signals are blocked and no Python runs, as in a collective that waits for a peer.
STUCK = (
    "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM}); "
    "ctypes.CDLL(None).usleep(60_000_000)"
)
LOST_PEER = "open(fifo).read(); raise RuntimeError('[gloo] Connection closed by peer')"


class Ranks:
    """Processes that run one body each, after all have met. timeout: of silent ranks, seconds.

    absent: ranks that do not join the others first. missing: ranks that are not even started.
    """

    def __init__(self, *bodies, timeout=30, absent=(), missing=()):
        script = (
            "import ctypes, signal, sys, time\n"
            "from resmoe_dist.errors import UserError\n"
            "from resmoe_dist.parallel.entry_point import run_entry_point\n"
            "from resmoe_dist.parallel.watch import current_watch\n"
            "def main():\n"
            "    {}\n"
            "    print('begun', flush=True)\n"
            "    time.sleep(0.5)\n"
            "    {}\n"
            "run_entry_point(main)\n"
        )
        joins = f"current_watch().join({timeout})"
        port = str(free_port())
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c"),
                    script.format("pass" if rank in absent else joins, body),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=REPOSITORY,
                env=os.environ
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(bodies))}
                | {"LOCAL_SIZE": str(len(bodies)), "MASTER_PORT": port},
            )
            for rank, body in enumerate(bodies)
            if rank not in missing
        ]
        for process in self.processes:
            assert process.stdout.readline() == "begun\n"
        time.sleep(1.2)  # two signs of life later

    def signal(self, rank, number):
        self.processes[rank].send_signal(number)

    def end(self, within):
        """Exit codes, and everything that was printed to standard error."""
        began = time.monotonic()
        # How a process ended is known until its parent asks, which launchers do once a second.
        time.sleep(1)
        try:
            printed = [process.communicate(timeout=60)[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        assert time.monotonic() - began < within
        return [process.returncode for process in self.processes], "".join(printed)


@pytest.mark.parametrize("body", [WAITS, STUCK], ids=["python", "compiled code"])
@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_killed_rank_ends_the_others_with_one_line(killed, body):
    ranks = Ranks(body, body, body)
    ranks.signal(killed, signal.SIGKILL)

    codes, printed = ranks.end(within=5)
    assert codes == [-9 if rank == killed else 1 for rank in range(3)]
    assert printed == (
        f"error: rank {killed} was killed by SIGKILL (if no one did this, the host ran out of "
        "memory)\n"
    )


@pytest.mark.slow
def test_eight_stuck_ranks_end_together():
    ranks = Ranks(*[STUCK] * 8)
    for rank in (0, 5):
        ranks.signal(rank, signal.SIGKILL)

    codes, printed = ranks.end(within=8)
    assert codes == [-9, 1, 1, 1, 1, -9, 1, 1]
    assert printed.startswith("error: rank ") and printed.count("\n") == 1


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_others_after_the_timeout_and_does_not_stay(stopped):
    ranks = Ranks(WAITS, STUCK, WAITS, timeout=2)
    ranks.signal(stopped, signal.SIGSTOP)

    codes, printed = ranks.end(within=10)
    assert codes == [-9 if rank == stopped else 1 for rank in range(3)]
    assert printed == (f"error: rank {stopped} stopped responding for 2 s (see --rank-timeout)\n")


def test_ranks_that_all_stand_still_for_longer_than_the_timeout_go_on():
    ranks = Ranks(*["time.sleep(3)"] * 2, timeout=2)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in range(2):
            ranks.signal(rank, number)
        time.sleep(3)

    assert ranks.end(within=10) == ([0, 0], "")


def test_computing_for_longer_than_the_timeout_is_no_failure():
    ranks = Ranks("ctypes.CDLL(None).usleep(3_000_000)", "sum(range(100_000_000))", timeout=2)

    assert ranks.end(within=60) == ([0, 0], "")


def test_an_unexpected_error_is_one_line_that_names_the_rank():
    codes, printed = Ranks(STUCK, "1 / 0", WAITS).end(within=5)

    assert codes == [1, 1, 1]
    assert printed.count("\n") == 1
    assert printed.startswith("error: rank 1 failed: ZeroDivisionError: division by zero (")


def test_invalid_input_that_one_rank_finds_gives_all_ranks_exit_code_2():
    codes, printed = Ranks(STUCK, WAITS, "raise UserError('f: damaged')").end(within=5)

    assert codes == [2, 2, 2]
    assert printed == "error: rank 2: f: damaged\n"


def test_ranks_that_fail_at_the_same_time_print_one_line():
    codes, printed = Ranks(*["raise UserError('f: damaged')"] * 4).end(within=5)

    assert codes == [2, 2, 2, 2]
    assert printed == "error: rank 0: f: damaged\n"


@pytest.mark.parametrize(
    "error", ["MemoryError()", "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')"]
)
def test_too_little_memory_is_one_line_that_says_what_to_do(error):
    codes, printed = Ranks(f"raise {error}", STUCK).end(within=5)

    assert codes == [1, 1]
    assert printed.startswith("error: rank 0: out of memory (") and printed.count("\n") == 1
    assert "use more ranks" in printed


def test_a_rank_that_loses_its_peer_does_not_print_a_traceback(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    body = LOST_PEER.replace("fifo", repr(str(tmp_path / "fifo")))
    ranks = Ranks(body, body, WAITS)
    # The reader's end arrives before the watch notices the killed rank.
    with open(tmp_path / "fifo", "w"):
        time.sleep(0.5)
    ranks.signal(2, signal.SIGKILL)

    codes, printed = ranks.end(within=5)
    assert codes == [1, 1, -9]
    assert printed.startswith("error: rank 2 was killed by SIGKILL") and printed.count("\n") == 1


def test_sigterm_for_one_rank_ends_all_and_names_it():
    ranks = Ranks(STUCK, WAITS, STUCK)
    ranks.signal(1, signal.SIGTERM)

    assert ranks.end(within=6) == ([143] * 3, "error: rank 1 was ended by SIGTERM\n")


def test_sigterm_before_all_have_started_is_one_line_that_names_who_is_missing():
    """What launchers do when a rank dies at once."""
    ranks = Ranks(WAITS, STUCK, WAITS, absent=(1, 2), missing=(0,))
    for process in ranks.processes:
        process.send_signal(signal.SIGTERM)

    line = "error: rank 1 was ended by SIGTERM before rank 0 had started\n"
    assert ranks.end(within=8) == ([143, 143], line)


def test_an_error_before_all_have_started_is_printed_by_its_rank():
    ranks = Ranks("raise UserError('a mistake')", WAITS, absent=(0,), missing=(1,))

    assert ranks.end(within=14) == ([2], "error: a mistake\n")


def test_ctrl_c_ends_all_ranks_silently():
    ranks = Ranks(STUCK, WAITS)
    for rank in range(2):
        ranks.signal(rank, signal.SIGINT)

    assert ranks.end(within=6) == ([130, 130], "")


def test_the_text_of_an_interrupted_rank_is_printed_although_launchers_signal_twice():
    waits = "try: time.sleep(60)\n    except KeyboardInterrupt: raise KeyboardInterrupt('at 7')"
    ranks = Ranks(waits, WAITS)
    for number in (signal.SIGINT, signal.SIGTERM):
        for rank in range(2):
            ranks.signal(rank, number)
        time.sleep(0.02)

    assert ranks.end(within=6) == ([130, 130], "at 7\n")


def test_a_rank_that_has_finished_fails_if_another_one_fails_later():
    codes, printed = Ranks("pass", "time.sleep(2); raise UserError('f: damaged')").end(within=8)

    assert codes == [2, 2]
    assert printed == "error: rank 1: f: damaged\n"


@pytest.mark.parametrize(
    ("absent", "body"), [(0, "current_watch().hand_over()"), (1, "sys.exit(0)")]
)
def test_a_rank_that_does_not_join_ends_those_that_wait_for_it(absent, body):
    bodies = [body if rank == absent else STUCK for rank in range(3)]
    codes, printed = Ranks(*bodies, absent=[absent]).end(within=5)

    # A rank that exits with 0 has done so before anyone waits.
    assert codes == [0 if rank == absent and "exit" in body else 2 for rank in range(3)]
    assert printed == f"error: rank {absent} does not join the others; start all ranks alike\n"


def test_ranks_that_all_hand_over_go_on():
    bodies = ["current_watch().hand_over()", "time.sleep(1); current_watch().hand_over()"]

    assert Ranks(*bodies, absent=[0, 1]).end(within=5) == ([0, 0], "")


def test_ranks_end_when_their_launcher_is_killed(tmp_path):
    # Launchers are known by name.
    launcher = tmp_path / "torchrun"
    launcher.write_text(
        "import sys, time\n"
        "from tests.parallel.test_watch import STUCK, Ranks\n"
        "ranks = Ranks(STUCK, STUCK)\n"
        "print(*[process.pid for process in ranks.processes], flush=True)\n"
        "sys.stdout.flush()\n"
        "for process in ranks.processes: print(process.stderr.read(), end='', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, launcher],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    ranks = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(ranks) == 2
    process.kill()
    process.communicate(timeout=30)

    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive
