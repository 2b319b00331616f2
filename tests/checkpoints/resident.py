"""Checking the peak memory of a block of code, memory-mapped files included."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

MIB = 1 << 20
_M_MMAP_THRESHOLD = -3


@contextmanager
def at_most_resident(limit: int) -> Iterator[None]:
    """Fail if resident memory grows by more than `limit` bytes at any time in the block.

    The allocator returns freed tensors to the system from now on. Otherwise what it keeps of them
    would count, which depends on everything that the process did before.
    """
    with suppress(AttributeError):  # only glibc has mallopt
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MIB)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM, the peak
    before = _status("VmRSS")
    yield
    grown = _status("VmHWM") - before
    assert grown <= limit, f"grew by {grown / MIB:.1f} MiB, {limit / MIB:.1f} allowed"


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        (value,) = (line.split()[1] for line in file if line.startswith(f"{key}:"))
    return int(value) * 1024
