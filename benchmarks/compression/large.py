"""A model larger than the memory it is compressed in: peaks of the real command's processes.

With `--kill-after` the command is killed and continued with `--resume`. Files that were finished
before must not be made again. With `--against` all files must equal those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from benchmarks.harness import logger, positive
from benchmarks.processes import add_compress_options, compress_watched, differing_files
from benchmarks.synthetic import add_model_arguments, model_of
from benchmarks.tables import Row
from benchmarks.timing import Clock
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.report import describe
from resmoe_dist.sizes import parse_size

TABLES = (
    (
        *("rows", "run", "s=seconds:.1f", "working s=working:.1f", "within_bound"),
        *("anonymous, one=largest_anonymous:bytes", "anonymous, all=memory.total.anonymous:bytes"),
        *("file, all=memory.total.file:bytes", "shared, all=memory.total.shared:bytes"),
        "resident, one=memory.one.high_water:bytes",
    ),
    (
        *("result", "bound on each rank=max_memory:bytes", "experts=source_bytes:bytes"),
        *("stored=stored_bytes:bytes", "finished when killed=finished_before:count"),
        *("made_again:names", "differing_files:names"),
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `large`."""
    add_model_arguments(parser)
    add_compress_options(parser)
    add = parser.add_argument
    text = "`source` is made once, `compressed` (`resumed` with --kill-after) in every run"
    add("--work", type=Path, required=True, metavar="DIR", help=text)
    add("--max-memory", metavar="SIZE", default="8GB", help="as in `compress` (default 8GB)")
    add("--ranks", type=positive, default=1, help="started by mpirun if there are several")
    text = "kill the command this long after its work began, then continue with --resume"
    add("--kill-after", type=float, metavar="SECONDS", help=text)
    add("--against", type=Path, metavar="DIR", help="a result that this one must equal")
    parser.set_defaults(repeats=1)


def measure(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """rows: per run of the command. result: one row; names of files are None if not asked for."""
    source = args.work / "source"
    output = args.work / ("compressed" if args.kill_after is None else "resumed")
    partial = output.with_name(f"{output.name}.partial")
    if args.against is not None:
        if not args.against.is_dir():
            raise UserError(f"--against {args.against}: no such folder")
        if args.against.resolve() == output.resolve():
            raise UserError(f"--against {args.against}: this run replaces it; move it elsewhere")
    bound = parse_size(args.max_memory)
    model_of(args).ensure_in(source)
    rows: list[Row] = []
    result: Row = {"max_memory": bound}

    def run(name: str, more: str = "", kill_after: float | None = None) -> None:
        options = f"{args.options} --max-memory {bound} --device {args.device}{more}"
        how = {"threads": args.threads, "kill_after": kill_after}
        done = compress_watched(source, output, options, args.ranks, **how)
        logger.info("%s run, %d rank(s): %.1f s", name, args.ranks, done.seconds)
        # The bound is on memory that is not page cache.
        largest = done.memory["one"].get("anonymous", 0)
        fits = {"largest_anonymous": largest, "within_bound": largest <= bound}
        rows.append({"run": name, **vars(done), **fits})

    for _ in clock.repeats():
        for folder in (output, partial):
            shutil.rmtree(folder, ignore_errors=True)
        if args.kill_after is None:
            run("whole")
            continue
        run("killed", kill_after=args.kill_after)
        before = _finished_files(partial / "model")
        run("resumed", " --resume")
        after = _finished_files(output)
        result["finished_before"] = sorted(before)
        result["made_again"] = [n for n in sorted(before) if after.get(n) != before[n]]
    experts = describe(CompressedCheckpoint(output))["experts"]
    keys = ("source_bytes", "stored_bytes", "ratio", "relative_error")
    result |= {key: experts[key] for key in keys}
    if args.against is not None:
        result["differing_files"] = differing_files(output, args.against)
    return {"rows": rows, "result": [result]}


def _finished_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each finished file: both differ for a file that is made again."""
    found = {path.name: path.stat() for path in folder.glob("[!.]*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}
