"""Ways to run experts: transformers' implementations, and our modes of execution.

A dense way is left out if it cannot run, or if it would copy too much: `batched_mm` copies the
weights of an expert for every token that is sent to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from benchmarks.timing import Effort, Summary, medians
from resmoe_dist.errors import first_line
from resmoe_dist.evaluation.tables import human_bytes
from resmoe_dist.runtime import execution
from resmoe_dist.runtime.execution import Auto, Restore
from resmoe_dist.runtime.layer import ResMoE

T = TypeVar("T")

DENSE = ("eager", "batched_mm", "grouped_mm")
# `cached` is as fast as dense if all experts fit its budget, and else as fast as `restore`.
MODES = tuple(mode for mode in execution.MODES if mode != "cached")


def try_ways(
    ways: Mapping[str, Callable[[], T]], gathered_bytes: int, effort: Effort
) -> tuple[dict[str, T], dict[str, str]]:
    """Call each way once, which pays for what only first calls cost.

    gathered_bytes: what `batched_mm` would copy. Returns what each way returned, and why dense ways
    were left out. Raises RuntimeError if one of our ways fails.
    """
    results, skipped = {}, {}
    for name, way in ways.items():
        if name == "batched_mm" and gathered_bytes > effort.gathered_bytes:
            skipped[name] = f"would copy {human_bytes(gathered_bytes)} of weights"
            continue
        try:
            results[name] = way()
        except RuntimeError as error:
            if name not in DENSE:
                raise
            skipped[name] = first_line(error)
    return results, skipped


def against_dense(seconds: Mapping[str, Summary]) -> dict[str, Any]:
    """fastest_dense: by the median. ratios: how many times as fast as it each way is."""
    median = medians(seconds)
    fastest = min((name for name in DENSE if name in median), key=median.__getitem__)
    ratios = {name: median[fastest] / taken for name, taken in median.items()}
    return {"fastest_dense": fastest, "ratios": ratios}


def workspace_bytes(layer: ResMoE) -> int:
    """Bytes of the buffer that a layer's execution restores experts into, as large as it grew."""
    execution = layer.experts.execution
    ways = execution.ways.values() if isinstance(execution, Auto) else [execution]
    return sum(way.workspace.nbytes for way in ways if isinstance(way, Restore))
