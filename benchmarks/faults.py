"""Faults of ranks during launch/infer.py: does every process end, and does one line say why?

    python -m benchmarks.faults --count 200 [--ranks 4] [--seed 0] [--json F]

Each run starts a small grid under the `deepspeed` launcher, lets a random rank fail in a random way
at a random moment, and checks that all processes end in time, that the exit code is not zero, that
exactly one line starts with `error: ` and names what failed, and that no process, shared memory or
temporary file is left.

kinds: kill (SIGKILL), stop (SIGSTOP), term (SIGTERM) at a random time, from the start of the ranks
on; launcher: SIGTERM to the `deepspeed` command; raise, memory: an exception in a layer; damage: a
truncated file that one rank opens.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
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

from benchmarks.processes import ROOT
from resmoe_dist.checkpoints.tensor_files import write_json
from resmoe_dist.parallel.entry_point import run_entry_point
from resmoe_dist.parallel.rendezvous import free_port
from resmoe_dist.testing.embedded import embedded_checkpoint

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
IN_LAYER = ("raise", "memory")
KINDS = (*SIGNALS, "launcher", *IN_LAYER, "damage")
_HANG_SECONDS = 120


@dataclass
class Outcome:
    """One run. seconds: from the fault to the end of all processes; None: they hang.

    lines: of ours on standard error. left: processes and files that remain.
    """

    kind: str
    rank: int
    delay: float
    seconds: float | None
    code: int | None
    lines: list[str]
    left: list[str]
    traceback: bool

    def is_clean(self, bound: float) -> bool:
        """Whether it ended as it should, within `bound` seconds."""
        return (
            self.seconds is not None
            and self.seconds <= bound
            and bool(self.code)
            and len(self.lines) == 1
            and re.search(r"\brank \d+", self.lines[0]) is not None
            and not self.left
            and not self.traceback
        )


def inject(
    kind: str,
    rank: int,
    model: Path,
    *,
    ranks: int = 4,
    delay: float = 5.0,
    rank_timeout: float = 5.0,
    launcher: Sequence[str] | None = None,
) -> Outcome:
    """Start `ranks` ranks, let `rank` fail after `delay` seconds, and see how all end.

    kind: one of KINDS. launcher: the command in front of the script, `deepspeed` by default.
    """
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "tmp"
        folder.mkdir()
        shared = set(os.listdir("/dev/shm"))
        environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        script = ["launch/infer.py"]
        if kind in IN_LAYER:
            script = ["--module", "benchmarks.faulty_rank"]
            environment["FAULT"] = f"{kind}:{rank}:{int(delay * 10)}"
        elif kind == "damage":
            model = _damaged(model, Path(work) / "model", rank)
        default = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port())]
        command = [
            *(launcher or default),
            *(*script, "--ep", str(ranks), "--model", str(model), "--prompt", "import"),
            *("--max-new-tokens", "900", "--rank-timeout", str(rank_timeout)),
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
        if kind in SIGNALS or kind == "launcher":
            time.sleep(delay)
            began = time.monotonic()
            with suppress(ProcessLookupError):
                if kind == "launcher":
                    process.terminate()
                else:
                    os.kill(pids[rank], SIGNALS[kind])
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
        _, error = process.communicate()
        left += [str(path) for path in folder.iterdir()]
        left += sorted(set(os.listdir("/dev/shm")) - shared)
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        stray = "Traceback" in error
        return Outcome(kind, rank, delay, ended, process.returncode, lines, left, stray)


def _damaged(model: Path, copy: Path, rank: int) -> Path:
    """A copy of a model in which the file of one EP rank is truncated."""
    shutil.copytree(model, copy)
    bad = sorted(copy.glob(f"resmoe-*-group-{rank:03d}.safetensors"))[0]
    bad.write_bytes(bad.read_bytes()[:-100])
    return copy


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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=20, help="faults to inject")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the grid: 1, 2, 4 or 8")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--seed", type=int, default=0, help="of kinds, ranks and moments")
    parser.add_argument("--latest", type=float, default=12, help="latest moment, in seconds")
    parser.add_argument("--bound", type=float, default=60, help="seconds that an end may take")
    parser.add_argument("--json", type=Path, metavar="F", help="write every outcome here")
    args = parser.parse_args()
    model = embedded_checkpoint(args.ranks)
    draw = random.Random(args.seed)
    outcomes = []
    for number in range(args.count):
        kind, rank = draw.choice(args.kinds), draw.randrange(args.ranks)
        outcome = inject(kind, rank, model, ranks=args.ranks, delay=draw.uniform(0, args.latest))
        outcomes.append(outcome)
        state = "clean" if outcome.is_clean(args.bound) else "NOT CLEAN"
        print(f"{number + 1}: {state} {outcome}", flush=True)
    ended = [o.seconds for o in outcomes if o.seconds is not None]
    clean = sum(outcome.is_clean(args.bound) for outcome in outcomes)
    print(f"{clean} of {len(outcomes)} clean, longest {max(ended):.1f} s")
    if args.json:
        write_json(args.json, [asdict(outcome) for outcome in outcomes])


if __name__ == "__main__":
    run_entry_point(main)
