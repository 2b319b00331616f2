"""One layer of a large model through `compress`, in this process: seconds by stage, and memory.

The pipeline itself records its stages (`resmoe_dist.compression.stages`). `rest` is what no stage
covers: opening the source, claims, and the files that are not experts'.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from benchmarks.harness import logger
from benchmarks.processes import MemoryWatch, add_compress_options, memory_of, reset_high_water
from benchmarks.synthetic import add_model_arguments, source_and_scratch
from benchmarks.timing import Clock, summary
from resmoe_dist.compression.stages import record_stages
from resmoe_dist.config.arguments import parse
from resmoe_dist.config.commands import CompressConfig
from resmoe_dist.heap import return_freed_memory
from resmoe_dist.launch.compress import compress

# In the order in which a group passes them.
_STAGES = ("read", "align", "barycenter", "center", "threshold", "encode", "write", "digest")
TABLES = (
    ("rows", "stage", "seconds:s", "share:.1%"),
    (
        *("layer", "experts=source_bytes:bytes", "stored=stored_bytes:bytes"),
        *("per second=bytes_per_second:bytes", "anonymous before=before.anonymous:bytes"),
        *("peak=memory.one.anonymous:bytes", "resident before=before.resident:bytes"),
        "resident peak=memory.one.high_water:bytes",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `layer`."""
    add_model_arguments(parser, layers=1)
    add_compress_options(parser)
    add = parser.add_argument
    add("--cold", action="store_true", help="read the source from the disk, not the page cache")
    add("--source", type=Path, metavar="DIR", help="keep the synthetic checkpoint, or reuse it")
    parser.set_defaults(repeats=1)


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """rows: per stage, and `total`. layer: one row, bytes of the group files and memory peaks."""
    taken: list[dict[str, float]] = []
    with source_and_scratch(args) as (source, scratch):
        output = scratch / "compressed"
        arguments = [str(source), str(output), *shlex.split(args.options)]
        config = parse(CompressConfig, "", [*arguments, "--device", args.device])
        # What writing the source has left must not count.
        return_freed_memory()
        reset_high_water()
        before = memory_of(os.getpid())
        with MemoryWatch() as watch:
            for repeat in clock.repeats():
                shutil.rmtree(output, ignore_errors=True)
                if args.cold:
                    _drop_from_cache(source)
                with record_stages() as recorded:
                    index, whole = clock.timed(lambda: compress(config))
                logger.info("repeat %d: %.1f s", repeat + 1, whole)
                rest = whole - sum(recorded.values())
                taken.append(recorded | {"rest": rest, "total": whole})
    stages = [stage for stage in (*_STAGES, "rest", "total") if stage in taken[0]]
    seconds = {stage: summary([each[stage] for each in taken]) for stage in stages}
    total = seconds["total"]["median"]
    rows = [{"stage": s, "seconds": t, "share": t["median"] / total} for s, t in seconds.items()]
    groups = [group for layer in index.layers for group in layer.groups]
    source_bytes = sum(group.source_bytes for group in groups)
    row = {
        "groups": len(groups),
        "source_bytes": source_bytes,
        "stored_bytes": sum(group.file.bytes for group in groups),
        "bytes_per_second": source_bytes / total,
        "before": before,
        "memory": watch.as_dict(),
    }
    return {"rows": rows, "layer": [row]}


def _drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
