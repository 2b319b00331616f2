"""Run a benchmark at a tiny size, as its command does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.timing import Effort

# Nothing here is about true speed, nor may it depend on it.
SMALL = Effort(evicting_bytes=1 << 16, streamed_bytes=1 << 16, too_slow=1e9)
TINY_MODEL = ("--rows", 40, "--hidden", 32, "--experts", 4)
TINY_EXPERT_BYTES = 40 * 3 * 32 * 2


def results_of(
    benchmarks: harness.Benchmarks, folder: Path, *arguments: object, **effort: Any
) -> dict[str, Any]:
    """The results that `--json` wrote. effort: what differs from SMALL."""
    path = folder / "report.json"
    given = [*map(str, arguments), "--json", str(path)]
    report = harness.run(benchmarks, given, replace(SMALL, **effort))
    assert json.loads(path.read_text()) == report
    return report["results"]
