"""The memory of this process, as Linux counts it."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path


def resident_bytes() -> int:
    """Return this process's anonymous memory: all that the system cannot drop as page cache."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no RssAnon")


def return_freed_memory() -> None:
    """Return the freed memory that the allocator still holds to the system (glibc only)."""
    with suppress(AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
