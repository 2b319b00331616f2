"""What is found out about launchers, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from resmoe_dist.parallel.processes import ProcessId, has_lost_its_command
from tests.jobs.runs import wait_until

PYTHON = sys.executable
SLEEP = "import time; time.sleep(60)"


def _started(pid: int) -> ProcessId:
    """The process once it runs Python: a fork of the shell comes before."""
    wait_until(lambda: Path(f"/proc/{pid}/cmdline").read_bytes().startswith(PYTHON.encode()))
    stat = Path(f"/proc/{pid}/stat").read_text()
    return ProcessId(pid, int(stat.rpartition(")")[2].split()[19]))


@pytest.mark.parametrize(
    ("options", "lost"),
    [
        ("deepspeed.launcher.launch", True),
        # As `start_grid` starts it, in place of a rank.
        ("deepspeed.launcher.launch --no_local_rank", False),
        ("another", False),
    ],
    ids=["started by the command", "started by us", "no launcher"],
)
def test_a_launcher_whose_command_has_ended_is_adopted(options, lost):
    script = f"{PYTHON} -c '{SLEEP}' {options} >/dev/null 2>&1 & echo $!"
    pid = int(subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout)
    try:
        assert has_lost_its_command(_started(pid)) == lost
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_launcher_whose_command_runs_is_not():
    process = subprocess.Popen([PYTHON, "-c", SLEEP, "deepspeed.launcher.launch"])
    try:
        assert not has_lost_its_command(_started(process.pid))
    finally:
        process.kill()
        process.wait()
