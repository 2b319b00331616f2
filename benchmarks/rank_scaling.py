"""One rank against several that have as many threads together: what spreading tasks gains.

The assignment solver runs on one thread however many there are; several ranks solve at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import shown, summary
from benchmarks.process import compress_command, differing_files, run_watched
from benchmarks.synthetic import add_model_arguments, model_of
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.tables import human_bytes, text_table

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `spread`."""
    add_model_arguments(parser, layers=8)
    parser.set_defaults(hidden=1024, rows=3584)
    add = parser.add_argument
    add("--ranks", type=int, default=4)
    add(
        "--threads",
        type=int,
        help="in all; a multiple of --ranks (default: the cores this process may use)",
    )
    add("--repeats", type=int, default=3)
    add(
        "--options",
        default="--ep 1",
        metavar="TEXT",
        help="more options of `compress` as one argument (default '--ep 1')",
    )
    add("--source", type=Path, metavar="DIR", help="keep the synthetic checkpoint, or reuse it")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one rank and of several, in turns; and whether all files are the same."""
    threads = args.threads or len(os.sched_getaffinity(0))
    if args.ranks < 2 or threads % args.ranks:
        raise UserError(
            f"--ranks {args.ranks}: must be 2 or more and divide {threads} threads; give --threads"
        )
    if args.source:
        args.source.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.source.parent if args.source else None) as scratch:
        source = args.source or Path(scratch) / "source"
        if not model_of(args).is_in(source):
            logger.info("writing the synthetic checkpoint")
            model_of(args).write(source)
        return _compare(args, source, Path(scratch), threads)


def _compare(args: argparse.Namespace, source: Path, scratch: Path, threads: int) -> dict[str, Any]:
    runs: dict[int, list[dict[str, Any]]] = {1: [], args.ranks: []}
    differing: set[str] = set()
    first = scratch / "first"
    for repeat in range(args.repeats):
        # In turns, and each first in turn: neither has the quieter machine.
        for ranks in (1, args.ranks)[:: 1 if repeat % 2 == 0 else -1]:
            output = scratch / "compressed" if first.exists() else first
            command = compress_command(source, output, args.options, ranks)
            partial = output.with_name(f"{output.name}.partial")
            done = run_watched(command, threads=threads // ranks, appears=partial)
            runs[ranks].append(done.as_dict())
            if output != first:
                differing |= set(differing_files(first, output))
                shutil.rmtree(output)
            logger.info(
                "%d rank(s): %.1f s (%d of %d)", ranks, done.seconds, repeat + 1, args.repeats
            )
    rows = [_summary(ranks, threads // ranks, of_ranks) for ranks, of_ranks in runs.items()]
    one, several = rows
    return {
        "rows": rows,
        "speedup": one["seconds"]["median"] / several["seconds"]["median"],
        "working_speedup": one["working"]["median"] / several["working"]["median"],
        "differing_files": sorted(differing),
    }


def _summary(ranks: int, threads: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "ranks": ranks,
        "threads": threads,
        "seconds": summary([run["seconds"] for run in runs]),
        "working": summary([run["working"] for run in runs]),
        "runs": runs,
    }


def table(results: dict[str, Any]) -> str:
    """The results of `measure` as text."""
    header = ["ranks", "threads each", "s", "working s", "anonymous, all ranks"]
    rows = [
        [
            *(str(row["ranks"]), str(row["threads"])),
            *(shown(row["seconds"]), shown(row["working"])),
            human_bytes(max(run["memory"]["together"]["anonymous"] for run in row["runs"])),
        ]
        for row in results["rows"]
    ]
    differing = results["differing_files"]
    return "\n".join(
        [
            text_table(header, rows),
            f"speed-up {results['speedup']:.2f}, "
            f"without the start of Python and its libraries {results['working_speedup']:.2f}",
            f"differing files: {', '.join(differing)}" if differing else "all files equal",
        ]
    )
