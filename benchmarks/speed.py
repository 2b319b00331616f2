"""What the benchmarks of speed share: contenders in turns, the memory's own speed, a report."""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.machine import machine_facts
from resmoe_dist.checkpoints.tensor_files import write_json
from resmoe_dist.errors import UserError
from resmoe_dist.parallel.entry_point import quiet_libraries, run_entry_point

# Several times what the last level of caches holds.
_EVICTING_BYTES = 256 << 20
_STREAMED_BYTES = 1 << 30
_STREAMED_REPEATS = 5
_LEAST_REPEATS = 3
# Times as long as the fastest that no chance explains.
_HOPELESS = 4


class Turns:
    """Contenders one after the other on one device, none of whose data are in the caches."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self._evicting = torch.ones(_EVICTING_BYTES // 8, dtype=torch.float64, device=device)
        self._random = random.Random(seed)

    def seconds(self, contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
        """One turn of each, in an order drawn anew: none has always the same before it."""
        order = self._random.sample(list(contenders), len(contenders))
        return {name: self._seconds(contenders[name]) for name in order}

    def _seconds(self, action: Callable[[], object]) -> float:
        # Read, as what is written would have to leave the caches at the contender's expense.
        self._evicting.sum()
        self._wait()
        begun = time.perf_counter()
        action()
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def repetitions(most: int, seconds: float) -> Iterator[int]:
    """0, 1 … below `most`; no more once `seconds` are over, but three, or `most`, in any case."""
    begun = time.perf_counter()
    for number in range(most):
        if number >= _LEAST_REPEATS and time.perf_counter() - begun > seconds:
            return
        yield number


def hopeless(turn: dict[str, float], names: Sequence[str]) -> set[str]:
    """Which of `names` took so much longer than the fastest of them that once is enough."""
    seconds = {name: turn[name] for name in names if name in turn}
    return {name for name, taken in seconds.items() if taken > _HOPELESS * min(seconds.values())}


def memory_speed(device: torch.device) -> dict[str, float]:
    """Bytes per second that this many threads read, and that a copy reads and writes together.

    Reading is the faster of a sum and a dot product of two halves, over 1 GiB; each the fastest of
    five.
    """
    turns = Turns(device)
    values = torch.ones(_STREAMED_BYTES // 4, device=device)
    halves = values.view(2, -1)
    work = {
        "sum": lambda: values.view(torch.float64).sum(),
        "dot": lambda: torch.dot(halves[0], halves[1]),
        "copy": lambda: halves[0].copy_(halves[1]),
    }
    taken = [turns.seconds(work) for _ in range(_STREAMED_REPEATS + 1)][1:]
    least = {name: min(turn[name] for turn in taken) for name in work}
    return {
        "read": _STREAMED_BYTES / min(least["sum"], least["dot"]),
        "copy": _STREAMED_BYTES / least["copy"],
    }


def milliseconds(found: dict[str, Any]) -> str:
    """A `summary` of seconds as text: the median, and the spread where there is one."""
    median, least, most = (_digits(1000 * found[key]) for key in ("median", "least", "most"))
    return median if len(found["all"]) == 1 else f"{median} ({least}-{most})"


def run(benchmark: ModuleType, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a benchmark that has a command of its own, print its table, return what `--json` writes.

    benchmark: has add_arguments(parser), measure(args) for results as JSON, table(results) as text.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{Path(benchmark.__file__).stem}",
        description=benchmark.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmark.add_arguments(parser)
    add = parser.add_argument
    add("--threads", type=positive, help="default: as many as torch takes")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--json", type=Path, metavar="F", help="write everything here too")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; leave --device out")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        machine = machine_facts()
        # As `generate` does.
        with torch.no_grad():
            results = benchmark.measure(args)
    finally:
        torch.set_num_threads(before)
    print(benchmark.table(results))
    print(
        f"\n{machine['cpu']}, {machine['cpu_capability']}: {machine['cores']} cores, "
        f"{machine['threads']} threads; torch {machine['versions']['torch']}, "
        f"transformers {machine['versions']['transformers']}"
    )
    options = {key: _plain(value) for key, value in vars(args).items() if key != "json"}
    report = {"options": options, "machine": machine, "results": results}
    if args.json:
        write_json(args.json, report)
    return report


def main(benchmark: ModuleType) -> None:
    """Entry point: exit code 2 for a user's mistake."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    quiet_libraries()

    def measure() -> None:
        run(benchmark, sys.argv[1:])

    run_entry_point(measure)


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


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
