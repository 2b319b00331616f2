"""Memory of a process and all it has started, sampled while it runs."""

from __future__ import annotations

import os
import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

_SAMPLE_SECONDS = 0.05
# Samples from one search of all processes for descendants to the next, and from one walk of the
# kernel over the page tables to the next: seldom enough not to slow what is measured.
_FAMILY_EVERY = 5
_UNIQUE_EVERY = 20
# What /proc/PID/status calls them -> what they are called here. The high-water mark is the
# kernel's own: no sample misses it.
_STATUS = {
    "RssAnon": "anonymous",
    "RssFile": "file",
    "RssShmem": "shared",
    "VmRSS": "resident",
    "VmHWM": "high_water",
}


def memory_of(pid: int, *, unique: bool = False) -> dict[str, int]:
    """Bytes of one process by kind; empty if it is gone.

    anonymous: what it cannot give back as page cache. file: mapped files, shared: shared memory,
    resident: all three. high_water: the most that was ever resident. unique: what would be free
    without this process (private pages, clean and dirty), only if asked for.
    """
    found: dict[str, int] = {}
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE):
            if name in _STATUS:
                found[_STATUS[name]] = int(kib) * 1024
        if unique and found:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            private = re.findall(r"^Private_\w+:\s+(\d+) kB$", rollup, re.MULTILINE)
            found["unique"] = sum(map(int, private)) * 1024
    return found


def forget_high_water() -> None:
    """Let this process's `high_water` begin anew, where the kernel allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def family_of(pid: int) -> list[psutil.Process]:
    """A process and all that descends from it; empty if it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


class MemoryWatch:
    """Peaks of a process and its descendants, sampled in a thread for as long as it is entered.

    one: each kind's largest value in any one process. together: the largest sum over all of them at
    one moment. of_processes: how many there were at most.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._pid = os.getpid() if pid is None else pid
        self.one: dict[str, int] = {}
        self.together: dict[str, int] = {}
        self.of_processes = self.samples = 0
        self._family: list[psutil.Process] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._sample()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "one": self.one,
            "together": self.together,
            "processes": self.of_processes,
            "samples": self.samples,
        }

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        unique = self.samples % _UNIQUE_EVERY == 0
        if self.samples % _FAMILY_EVERY == 0:
            self._family = family_of(self._pid)
        found = [memory_of(process.pid, unique=unique) for process in self._family]
        found = [memory for memory in found if memory]
        self.samples += 1
        self.of_processes = max(self.of_processes, len(found))
        for kind in {kind for memory in found for kind in memory}:
            sizes = [memory.get(kind, 0) for memory in found]
            self.one[kind] = max(self.one.get(kind, 0), *sizes)
            if kind != "high_water":  # of different moments
                self.together[kind] = max(self.together.get(kind, 0), sum(sizes))
