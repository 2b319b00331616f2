"""One rank beside several ranks with as many threads in total: what spreading tasks gains.

The assignment solver runs on one thread; several ranks solve at the same time.
"""

from __future__ import annotations

import argparse
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import logger, positive
from benchmarks.processes import Finished, add_compress_options, compress_watched, differing_files
from benchmarks.synthetic import add_model_arguments, source_and_scratch
from benchmarks.tables import Row
from benchmarks.timing import Clock, summary
from resmoe_dist.errors import UserError

TABLES = (
    (
        *("rows", "ranks", "threads each=threads", "s=seconds:s", "working s=working:s"),
        "anonymous, all ranks=anonymous:bytes",
    ),
    (
        *("comparison", "speedup:.2f", "without the start of Python=working_speedup:.2f"),
        "differing_files:names",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `spread`. `--threads` is their total."""
    add_model_arguments(parser, layers=8)
    add_compress_options(parser)
    parser.set_defaults(hidden=1024, rows=3584)
    add = parser.add_argument
    add("--ranks", type=positive, default=4, help="must divide --threads (default: all cores)")
    add("--source", type=Path, metavar="DIR", help="keep the synthetic checkpoint, or reuse it")


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """rows: of one rank and of several. comparison: one row; files differ between any two runs."""
    threads = args.threads or len(os.sched_getaffinity(0))
    if args.ranks < 2 or threads % args.ranks:
        raise UserError(
            f"--ranks {args.ranks}: must be 2 or more and divide {threads} threads; give --threads"
        )
    runs: dict[int, list[Finished]] = {1: [], args.ranks: []}
    differing: set[str] = set()
    options = f"{args.options} --device {args.device}"
    with source_and_scratch(args) as (source, scratch):
        first, next_one = scratch / "first", scratch / "next"

        def compress(ranks: int) -> None:
            output = next_one if first.exists() else first
            share = threads // ranks
            done = compress_watched(source, output, options, ranks=ranks, threads=share)
            runs[ranks].append(done)
            logger.info("%d rank(s): %.1f s", ranks, done.seconds)
            if output != first:
                differing.update(differing_files(first, output))
                shutil.rmtree(output)

        work = {str(ranks): partial(compress, ranks) for ranks in runs}
        # The seconds are those of the processes alone, without the comparison of their files.
        clock.compare(lambda: work)
    rows = [_row(ranks, threads // ranks, of_ranks) for ranks, of_ranks in runs.items()]
    one, several = rows
    comparison = {
        "speedup": one["seconds"]["median"] / several["seconds"]["median"],
        "working_speedup": one["working"]["median"] / several["working"]["median"],
        "differing_files": sorted(differing),
    }
    return {"rows": rows, "comparison": [comparison]}


def _row(ranks: int, threads: int, runs: list[Finished]) -> Row:
    return {
        "ranks": ranks,
        "threads": threads,
        "seconds": summary([run.seconds for run in runs]),
        "working": summary([run.working or 0.0 for run in runs]),
        "anonymous": max(run.memory["total"]["anonymous"] for run in runs),
        "runs": [vars(run) for run in runs],
    }
