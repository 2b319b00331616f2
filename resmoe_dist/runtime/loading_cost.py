"""What loading costs this process: memory at its peak, and bytes read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_PROCESS = Path("/proc/self")


@dataclass
class LoadingCost:
    """peak_bytes: by how much resident memory exceeded that before, at most. read_bytes: from
    files, mapped ones not included. None if the system cannot tell. kept_bytes: of the model that
    was loaded, for the caller to fill in."""

    peak_bytes: int | None = None
    read_bytes: int | None = None
    kept_bytes: int = 0


@contextmanager
def loading_cost() -> Iterator[LoadingCost]:
    """Measures what happens inside. The cost is known when the context is left."""
    cost = LoadingCost()
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")  # the peak counts from now
    resident, read = _number("status", "VmRSS"), _number("io", "rchar")
    yield cost
    peak, read_then = _number("status", "VmHWM"), _number("io", "rchar")
    if resident is not None and peak is not None:
        # The file gives KiB.
        cost.peak_bytes = 1024 * max(0, peak - resident)
    if read is not None and read_then is not None:
        cost.read_bytes = read_then - read


def _number(file: str, name: str) -> int | None:
    """A number that Linux tells about this process; None on other systems."""
    with suppress(OSError):
        found = re.search(rf"^{name}:\s*(\d+)", (_PROCESS / file).read_text(), re.MULTILINE)
        return int(found[1]) if found else None
    return None
