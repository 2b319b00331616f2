"""Faults of ranks during launch/infer.py: does every process end, and does one line say why?

    python -m benchmarks.faults --count 200 [--ranks 4] [--seed 0] [--json F]

Each run starts a small grid under the `deepspeed` launcher, lets a random rank fail in a random way
at a random moment, and checks that all processes end in time, that the exit code is right, that
exactly one line starts with `error: ` and is the one that is due, and that no process, shared
memory or temporary file is left. `fault_kinds` has the kinds of faults; those from outside strike
at a random time, from the start of the ranks on.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks.fault_kinds import INSIDE, KINDS
from benchmarks.faulty_rank import Fault
from benchmarks.processes import ROOT
from resmoe_dist.checkpoints.tensor_files import write_json
from resmoe_dist.parallel.entry_point import run_entry_point
from resmoe_dist.parallel.rendezvous import free_port
from resmoe_dist.testing.embedded import embedded_checkpoint

_HANG_SECONDS = 120
# Which call of a MoE layer a fault inside a rank awaits: about as many are made in a second.
_CALLS_PER_SECOND = 10
# Lines of standard error that are kept of a run.
_KEPT_LINES = 30


@dataclass
class Outcome:
    """One run. seconds: from the fault to the end of all processes; None: they hang.

    lines: of ours on standard error. left: processes and files that remain. error: the end of
    standard error.
    """

    kind: str
    rank: int
    ranks: int
    delay: float
    seconds: float | None
    code: int | None
    lines: list[str]
    left: list[str]
    error: list[str]

    def problems(self, bound: float) -> list[str]:
        """What is wrong with how it ended; nothing if it ended as it should."""
        kind = KINDS[self.kind]
        in_time = self.seconds is not None and self.seconds <= bound
        right_code = bool(self.code) if kind.code is None else self.code == kind.code
        one_line = len(self.lines) == 1
        found = {
            f"it took {self.seconds} s": in_time,
            f"exit code {self.code}": right_code,
            f"{len(self.lines)} lines": one_line,
            "another line than is due": not one_line
            or kind.expects(self.lines[0], self.rank, self.ranks),
            f"left: {', '.join(self.left)}": not self.left,
            "a traceback": not any("Traceback" in line for line in self.error),
        }
        return [problem for problem, is_right in found.items() if not is_right]


def inject(
    kind: str,
    rank: int,
    model: Path,
    *,
    ranks: int = 4,
    delay: float = 5.0,
    number: int | None = None,
    rank_timeout: float = 5.0,
    launcher: Sequence[str] | None = None,
) -> Outcome:
    """Start `ranks` ranks, let `rank` fail, and see how all end.

    kind: one of KINDS. delay: seconds after which a fault strikes from outside. number: see
    `Fault`; it follows from `delay` by default. launcher: the command in front of the script,
    `deepspeed` by default.
    """
    fault = KINDS[kind]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "tmp"
        folder.mkdir()
        shared = set(os.listdir("/dev/shm"))
        environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        script = ["launch/infer.py"]
        other = fault.folder(model, Path(work) / "model", rank) if fault.folder else None
        if fault.damaged and other:
            model = other
        elif kind in INSIDE:
            script = ["--module", "benchmarks.faulty_rank"]
            number = int(delay * _CALLS_PER_SECOND) if number is None else number
            environment |= Fault(kind, rank, number, str(other)).environment()
        default = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())]
        command = [
            *(launcher or default),
            *(*script, "--ep", str(ranks), "--model", str(model), "--prompt", "import"),
            *("--max-new-tokens", "900", "--rank-timeout", str(rank_timeout), *fault.options),
        ]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        pids, family = _wait_for_ranks(process, ranks, script[-1])
        if fault.strike:
            time.sleep(delay)
            began = time.monotonic()
            with suppress(ProcessLookupError):
                fault.strike(process, pids[rank])
        else:
            # The moment of the fault is not known; the end of the first rank comes right after.
            while all(map(_runs, pids)) and process.poll() is None:
                time.sleep(0.05)
            began = time.monotonic()
        seconds = _wait_for_end(family, process)
        ended = None if seconds is None else time.monotonic() - began
        left = [f"process {pid}" for pid in family if _runs(pid)]
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if process.poll() is None:
            process.kill()
        error = process.communicate()[1].splitlines()
        left += [str(path) for path in folder.iterdir()]
        left += sorted(n for n in set(os.listdir("/dev/shm")) - shared if not _is_of_others(n))
        lines = [line for line in error if line.startswith("error: ")]
        code = process.returncode
        return Outcome(kind, rank, ranks, delay, ended, code, lines, left, error[-_KEPT_LINES:])


def _is_of_others(name: str) -> bool:
    """Whether a file of shared memory names a process that still runs: none of ours does."""
    return any(_runs(int(number)) for number in re.findall(r"\d+", name) if len(number) < 10)


def _runs(pid: int) -> bool:
    with suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _wait_for_ranks(
    process: subprocess.Popen[str], ranks: int, script: str
) -> tuple[list[int], list[int]]:
    """Process ids by rank, and those of all processes, as soon as all ranks run."""
    while process.poll() is None:
        found = {}
        family = psutil.Process(process.pid).children(recursive=True)
        for child in family:
            with suppress(psutil.Error):
                if script in child.cmdline()[:5]:
                    names = ("RANK", "OMPI_COMM_WORLD_RANK")
                    environment = child.environ()
                    found |= {int(environment[n]): child.pid for n in names if n in environment}
        if len(found) == ranks:
            pids = [found[rank] for rank in range(ranks)]
            return pids, [process.pid, *(child.pid for child in family)]
        time.sleep(0.05)
    raise AssertionError(f"the ranks did not start:\n{process.communicate()[1]}")


def _wait_for_end(pids: list[int], process: subprocess.Popen[str]) -> float | None:
    """Seconds until all processes have ended; None if some do not."""
    began = time.monotonic()
    while any(map(_runs, pids)):
        process.poll()
        if time.monotonic() - began > _HANG_SECONDS:
            return None
        time.sleep(0.02)
    return time.monotonic() - began


def main() -> None:
    """Inject `--count` random faults and print how they ended."""
    kinds = "\n".join(f"  {name:14} {kind.what}" for name, kind in KINDS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__.splitlines()[0]}\n\nkinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=20, help="faults to inject")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the grid: 2, 4 or 8")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, ranks and moments")
    parser.add_argument("--latest", type=float, default=12, help="latest moment, in seconds")
    parser.add_argument("--bound", type=float, default=60, help="seconds that an end may take")
    parser.add_argument("--json", type=Path, metavar="F", help="write every outcome here")
    args = parser.parse_args()
    model = embedded_checkpoint(args.ranks, may_join=False)
    draw = random.Random(args.seed)
    outcomes: list[Outcome] = []
    for number in range(args.count):
        kind, rank = draw.choice(args.kinds), draw.randrange(args.ranks)
        outcome = inject(kind, rank, model, ranks=args.ranks, delay=draw.uniform(0, args.latest))
        outcomes.append(outcome)
        problems = outcome.problems(args.bound)
        state = f"NOT CLEAN ({'; '.join(problems)}) {outcome}" if problems else "clean"
        seconds = f"{outcome.seconds or math.inf:.1f} s"
        print(f"{number + 1}: {kind}, rank {rank}, {seconds}: {state}", flush=True)
        if args.json:
            write_json(args.json, [asdict(outcome) for outcome in outcomes])
    print(summary(outcomes, args.bound))


def summary(outcomes: Sequence[Outcome], bound: float) -> str:
    """How many of each kind ended as they should, and the longest time that one took."""
    lines = []
    for name in (*KINDS, None):
        mine = [outcome for outcome in outcomes if name in (None, outcome.kind)]
        if mine:
            clean = sum(not outcome.problems(bound) for outcome in mine)
            longest = max(outcome.seconds or math.inf for outcome in mine)
            lines.append(f"{name or 'all'}: {clean} of {len(mine)} clean, longest {longest:.1f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    run_entry_point(main)
