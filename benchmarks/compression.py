"""Measure compression: `python -m benchmarks.compression --help`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import alignment, centers, large_model, one_layer, rank_scaling, tiny_models
from benchmarks.machine import machine_facts
from resmoe_dist.checkpoints.tensor_files import write_json
from resmoe_dist.parallel.entry_point import quiet_libraries, run_entry_point

# Each has add_arguments(parser), measure(args) for results as JSON, and table(results) as text.
_BENCHMARKS = {
    "alignment": alignment,
    "center": centers,
    "layer": one_layer,
    "large": large_model,
    "spread": rank_scaling,
    "models": tiny_models,
}


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Run one benchmark, print its table, and return what `--json` writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in _BENCHMARKS.items():
        summary = benchmark.__doc__.split("\n")[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=benchmark.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        benchmark.add_arguments(command)
        command.add_argument("--json", type=Path, metavar="F", help="write everything here too")
    args = parser.parse_args(arguments)
    benchmark = _BENCHMARKS[args.benchmark]
    machine = machine_facts()
    results = benchmark.measure(args)
    print(benchmark.table(results))
    print(
        f"\n{machine['cpu']}, {machine['cpu_capability']}: {machine['cores']} cores, "
        f"{machine['threads']} threads; torch {machine['versions']['torch']}"
    )
    options = {key: _plain(value) for key, value in vars(args).items() if key != "json"}
    report = {"options": options, "machine": machine, "results": results}
    if args.json:
        write_json(args.json, report)
    return report


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def main() -> None:
    """Entry point: exit code 2 for a user's mistake."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    quiet_libraries()

    def measure() -> None:
        run(sys.argv[1:])

    run_entry_point(measure)


if __name__ == "__main__":
    main()
