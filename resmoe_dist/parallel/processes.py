"""What Linux says about other processes: launchers above this one, and how a process ended."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

# Programs that start ranks, by the name of the file or of the module that is run.
_LAUNCHERS = {
    *("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
    *("mpirun", "mpiexec", "mpiexec.hydra", "prterun", "prted", "orterun", "orted"),
    *("hydra_pmi_proxy", "srun", "slurmstepd"),
}


@dataclass(frozen=True)
class ProcessId:
    """A process, told from a later one with the same number by its start.

    started: clock ticks since boot.
    """

    pid: int
    started: int

    def is_running(self) -> bool:
        """Whether it exists and has not ended."""
        stat = _stat(self.pid)
        return stat is not None and stat.started == self.started and stat.state not in "ZX"

    def ending(self) -> str | None:
        """How it ended, as far as its parent has not asked yet: `was killed by SIGKILL`, say."""
        stat = _stat(self.pid)
        if stat is None or stat.started != self.started or stat.state != "Z":
            return None
        if number := stat.exit_status & 0x7F:
            return f"was killed by {signal.Signals(number).name}"
        code = stat.exit_status >> 8
        return f"ended with exit code {code}"

    def cpu_ticks(self) -> int:
        """Processor time that it has used, in clock ticks; 0 if it has ended."""
        stat = _stat(self.pid)
        return stat.ticks if stat is not None and stat.started == self.started else 0

    def kill(self) -> None:
        """Send SIGKILL, if it still runs and belongs to this user."""
        if self.is_running():
            try:
                os.kill(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                return


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    ticks: int
    started: int
    exit_status: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return None
    # The name before the fields is in parentheses and may hold anything.
    fields = text.rpartition(")")[2].split()
    return _Stat(
        state=fields[0],
        parent=int(fields[1]),
        ticks=int(fields[11]) + int(fields[12]),
        started=int(fields[19]),
        exit_status=int(fields[49]),
    )


def this_process() -> ProcessId:
    """This process."""
    stat = _stat(os.getpid())
    return ProcessId(os.getpid(), stat.started if stat else 0)


def launchers_above() -> list[ProcessId]:
    """The launchers among this process's ancestors, the nearest first.

    The `deepspeed` command starts one launcher per host, which starts the ranks: both are found.
    A shell between this process and its launcher is passed over.
    """
    found: list[ProcessId] = []
    pid = os.getppid()
    while pid > 1 and (stat := _stat(pid)) is not None:
        if is_launcher(pid):
            found.append(ProcessId(pid, stat.started))
        elif found:
            break
        pid = stat.parent
    return found


def has_lost_its_command(launcher: ProcessId) -> bool:
    """Whether the `deepspeed` command that started this host's launcher of ranks has ended.

    The launcher goes on then, as a child of the system's first process. The command may end before
    a rank can look for it, so the rank sees only that.
    """
    stat = _stat(launcher.pid)
    words = _words(launcher.pid)
    # The launchers that we start ourselves, without the command, have this option.
    if stat is None or b"deepspeed.launcher.launch" not in words or b"--no_local_rank" in words:
        return False
    adopts = stat.parent == 1 or _name(stat.parent) in ("init", "systemd")
    return adopts and not is_launcher(stat.parent)


def is_launcher(pid: int) -> bool:
    """Whether a process runs a program that starts ranks."""
    # `python -u -m deepspeed.launcher.launch …`, `python /venv/bin/deepspeed …`, `mpirun …`.
    return any(os.path.basename(os.fsdecode(word)) in _LAUNCHERS for word in _words(pid)[:5])


def _words(pid: int) -> list[bytes]:
    """A process's command line; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
