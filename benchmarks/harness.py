"""What all benchmarks share: common options, the machine's facts, and the JSON report.

A benchmark is a module whose docstring says what it measures. It has

    add_arguments(parser)           its options, beside those that all benchmarks have
    measure(args, clock) -> dict    its results: rows by the name of their table
    TABLES                          (name, *columns) of each table, see `tables.table_of`

The report, which `--json` writes, holds `options`, `machine` and `results`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.tables import table_of
from benchmarks.timing import Clock, Effort
from resmoe_dist.checkpoints.tensor_files import write_json
from resmoe_dist.errors import UserError
from resmoe_dist.parallel.entry_point import launched_rank, quiet_libraries, run_entry_point

# One benchmark with a command, or several that share one and are named like their files.
Benchmarks = ModuleType | Sequence[ModuleType]

logger = logging.getLogger("benchmarks")
_LIBRARIES = ("torch", "transformers", "numpy", "scipy", "POT", "safetensors")


def main(benchmarks: Benchmarks) -> None:
    """Entry point of a command. Exit code 2 for invalid input."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    quiet_libraries()

    def measure() -> None:
        run(benchmarks, sys.argv[1:])

    run_entry_point(measure)


def run(
    benchmarks: Benchmarks, arguments: Sequence[str], effort: Effort | None = None
) -> dict[str, Any]:
    """Run one benchmark, print its tables, and return the report that `--json` writes.

    Of several ranks, the first prints and writes.
    """
    args = _parse(benchmarks, arguments)
    benchmark: ModuleType = args.benchmark
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; leave --device out")
    seconds = math.inf if args.seconds is None else args.seconds
    clock = Clock(torch.device(args.device), args.repeats, seconds, args.seed, effort)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads_before)
    try:
        with torch.no_grad():
            results = benchmark.measure(args, clock)
        # After it, because a benchmark of several ranks chooses the threads of each.
        machine = machine_facts()
    finally:
        torch.set_num_threads(threads_before)
    options = vars(args) | {"benchmark": _name(benchmark)}
    options = json.loads(json.dumps(options, default=str))
    report = {"options": options, "machine": machine, "results": results}
    if launched_rank():
        return report
    texts = [
        table_of(results[name], columns) for name, *columns in benchmark.TABLES if results[name]
    ]
    on = "{cpu}, {cpu_capability}: {cores} cores, {threads} threads; torch {versions[torch]}, "
    texts.append((on + "transformers {versions[transformers]}").format(**machine))
    print("\n\n".join(texts))
    if args.json:
        write_json(args.json, report)
    return report


def machine_facts() -> dict[str, Any]:
    """What figures depend on besides the code. cores: those that this process may use."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return number


def share(text: str) -> float:
    """A number in (0, 1], for argparse."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return number


def _parse(benchmarks: Benchmarks, arguments: Sequence[str]) -> argparse.Namespace:
    if isinstance(benchmarks, ModuleType):
        prog = f"python -m benchmarks.{_name(benchmarks)}"
        return _parser(argparse.ArgumentParser, benchmarks, prog=prog).parse_args(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression")
    commands = parser.add_subparsers(metavar="BENCHMARK", required=True)
    for module in benchmarks:
        first_line = str(module.__doc__).split("\n")[0]
        _parser(commands.add_parser, module, name=_name(module), help=first_line)
    return parser.parse_args(arguments)


def _name(benchmark: ModuleType) -> str:
    return Path(str(benchmark.__file__)).stem


def _parser(
    make: Callable[..., argparse.ArgumentParser], benchmark: ModuleType, **options: Any
) -> argparse.ArgumentParser:
    """The parser of one benchmark, with the options that all have."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = make(description=benchmark.__doc__, formatter_class=raw, **options)
    add = parser.add_argument
    add("--threads", type=positive, help="default: as many as torch takes")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    add("--repeats", type=positive, default=3, help="turns of each contender (default %(default)s)")
    add("--seconds", type=float, help="of a case: after them, and three repeats, begin no more")
    add("--seed", type=int, default=0, help="of everything random")
    add("--json", type=Path, metavar="F", help="write everything here too")
    parser.set_defaults(benchmark=benchmark)
    benchmark.add_arguments(parser)
    return parser
