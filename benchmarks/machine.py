"""What a figure depends on besides the code: the machine, its libraries, and chance."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_LIBRARIES = ("torch", "transformers", "numpy", "scipy", "POT", "safetensors")


def machine_facts() -> dict[str, Any]:
    """For JSON. cores: those this process may use, which are not all there need be."""
    return {
        "cpu": _first_match(Path("/proc/cpuinfo"), r"model name\s*:\s*(.+)"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def _first_match(path: Path, pattern: str) -> str | None:
    match = re.search(pattern, path.read_text())
    return match[1] if match else None


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Of the repeats of one thing, for JSON."""
    return {
        "median": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "all": list(seconds),
    }


def shown(found: dict[str, Any]) -> str:
    """A `summary` as text: the median, and the spread where there is one: `1.2 (1.18-1.31)`."""
    if len(found["all"]) == 1:
        return f"{found['median']:.3g}"
    return f"{found['median']:.3g} ({found['least']:.3g}-{found['most']:.3g})"


def timed(action: Callable[[], T]) -> tuple[T, float]:
    """What `action` returns, and the seconds that it took."""
    begun = time.perf_counter()
    result = action()
    return result, time.perf_counter() - begun
