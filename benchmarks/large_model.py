"""A model larger than the memory it is compressed in: peaks of the real command's processes.

With `--kill-after` the command is killed outright and continued with `--resume`; what it had
finished must not be made again, and with `--against` every file must be what an undisturbed run
wrote.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path
from typing import Any

from benchmarks.process import Finished, compress_command, differing_files, run_watched
from benchmarks.synthetic import add_model_arguments, model_of
from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.errors import UserError
from resmoe_dist.evaluation.report import describe
from resmoe_dist.evaluation.tables import human_bytes, text_table
from resmoe_dist.sizes import parse_size

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `large`."""
    add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--work",
        type=Path,
        required=True,
        metavar="DIR",
        help="holds the synthetic checkpoint, which is made once, in `source`, and the result in "
        "`compressed` (`resumed` with --kill-after), which is made anew",
    )
    add("--max-memory", metavar="SIZE", default="8GB", help="as in `compress` (default 8GB)")
    add("--ranks", type=int, default=1, help="started by mpirun where more than one")
    add("--threads", type=int, help="of each rank")
    add(
        "--options",
        default="--ep 1",
        metavar="TEXT",
        help="more options of `compress` as one argument (default '--ep 1')",
    )
    add(
        "--kill-after",
        type=float,
        metavar="SECONDS",
        help="kill it so long after its work began, then continue with --resume",
    )
    add("--against", type=Path, metavar="DIR", help="a result that this one must equal")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The command's runs, one or two, and what became of their files."""
    bound = parse_size(args.max_memory)
    source = args.work / "source"
    output = args.work / ("compressed" if args.kill_after is None else "resumed")
    if args.against is not None:
        if not args.against.is_dir():
            raise UserError(f"--against {args.against}: no such folder")
        if args.against.resolve() == output.resolve():
            raise UserError(f"--against {args.against}: is made anew; move it elsewhere")
    if not model_of(args).is_in(source):
        logger.info("writing the synthetic checkpoint")
        model_of(args).write(source)
    partial = output.with_name(f"{output.name}.partial")
    for folder in (output, partial):
        shutil.rmtree(folder, ignore_errors=True)
    options = f"{args.options} --max-memory {args.max_memory}"

    def run(name: str, more: str = "", kill_after: float | None = None) -> dict[str, Any]:
        logger.info("%s run: %d rank(s)", name, args.ranks)
        command = compress_command(source, output, options + more, args.ranks)
        # What a resumed run continues is there before it starts.
        appears = None if partial.exists() else partial
        done = run_watched(command, threads=args.threads, appears=appears, kill_after=kill_after)
        logger.info("%s run: %.1f s", name, done.seconds)
        return {"run": name, **done.as_dict(), **_within(done, bound)}

    results: dict[str, Any] = {"max_memory": bound}
    if args.kill_after is None:
        results["runs"] = [run("whole")]
    else:
        killed = run("killed", kill_after=args.kill_after)
        finished = _finished_files(partial / "model")
        results["runs"] = [killed, run("resumed", " --resume")]
        again = _finished_files(output)
        made_again = [name for name, file in finished.items() if again.get(name) != file]
        results |= {"finished_before": sorted(finished), "made_again": sorted(made_again)}
    results |= _described(output)
    if args.against is not None:
        results["differing_files"] = differing_files(output, args.against)
    return results


def _within(done: Finished, bound: int) -> dict[str, Any]:
    """Whether each rank kept the bound, which is on memory that is not page cache."""
    largest = done.memory["one"].get("anonymous", 0)
    return {"largest_anonymous": largest, "within_bound": largest <= bound}


def _finished_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Which very files lie in a folder, by name: a file that is made again is another one."""
    found = {path.name: path.stat() for path in folder.glob("*.safetensors")}
    return {
        name: (stat.st_ino, stat.st_mtime_ns)
        for name, stat in found.items()
        if not name.startswith(".")
    }


def _described(output: Path) -> dict[str, Any]:
    experts = describe(CompressedCheckpoint(output))["experts"]
    keys = ("source_bytes", "stored_bytes", "ratio", "relative_error")
    return {"experts": {key: experts[key] for key in keys}}


def table(results: dict[str, Any]) -> str:
    """The results of `measure` as text."""
    kinds = ("anonymous", "file", "shared", "unique", "high_water")
    header = ["run", "s", "working s", "anonymous, one", "all: anonymous", "file", "shared"]
    header += ["unique", "resident, one", "within bound"]
    rows = []
    for run in results["runs"]:
        one, together = run["memory"]["one"], run["memory"]["together"]
        working = run["working"]
        rows.append(
            [
                *(run["run"], f"{run['seconds']:.1f}"),
                "" if working is None else f"{working:.1f}",
                human_bytes(run["largest_anonymous"]),
                *(human_bytes(together.get(kind, 0)) for kind in kinds[:-1]),
                human_bytes(one.get("high_water", 0)),
                "yes" if run["within_bound"] else "NO",
            ]
        )
    experts = results["experts"]
    lines = [text_table(header, rows)]
    lines.append(
        f"bound {human_bytes(results['max_memory'])} on each rank; experts of "
        f"{human_bytes(experts['source_bytes'])} to {human_bytes(experts['stored_bytes'])}"
    )
    if "made_again" in results:
        lines.append(
            f"{len(results['finished_before'])} files were finished when it was killed, "
            f"{len(results['made_again'])} of them made again"
        )
    if "differing_files" in results:
        differing = results["differing_files"]
        lines.append(f"differing files: {', '.join(differing)}" if differing else "all files equal")
    return "\n".join(lines)
