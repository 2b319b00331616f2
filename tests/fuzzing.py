"""Do damaged model folders end in a result or in one line, and is every changed result noticed?

    python -m tests.fuzzing --first 0 --count 10000 compressed
    python -m tests.fuzzing --first 0 --count 2000 source

`compressed`: `verify`, `evaluate` and `load_model` on mutations of a compressed folder. `source`:
`compress` on mutations of a source folder, then `evaluate` of the result. Prints each mutation with
a traceback, a hang, or a changed result that neither loading nor `verify` noticed, and the counts.
A crash ends the process; `--first` continues.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from resmoe_dist.checkpoints.compressed import CompressedCheckpoint
from resmoe_dist.config.commands import CompressConfig, EvaluateConfig
from resmoe_dist.errors import UserError
from resmoe_dist.launch import evaluate as command
from resmoe_dist.launch.compress import compress
from resmoe_dist.parallel.entry_point import quiet_libraries
from resmoe_dist.runtime.loading import load_model
from tests.models import FAMILIES, logits_of, save_family
from tests.models import compress as compress_folder
from tests.mutations import mutate

HANG_SECONDS = 20
IDS = "[[3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3]]"


class Hang(BaseException):
    """Not an Exception: nothing may catch it."""


class FaultError(AssertionError):
    """What a damaged folder must not cause."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise Hang in a block that takes longer."""

    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(what: str, action: Callable[[], Any]) -> tuple[str, Any]:
    """("ok", result) or ("refused", message). Raises FaultError for anything else."""
    try:
        with time_limit(HANG_SECONDS):
            return "ok", action()
    except UserError as error:
        if "\n" in str(error):
            raise FaultError(f"{what}: more than one line: {error}") from error
        return "refused", str(error)
    except Hang as error:
        raise FaultError(f"{what}: hangs\n{traceback.format_exc()}") from error
    except Exception as error:
        raise FaultError(f"{what}: {traceback.format_exc()}") from error


def evaluation(folder: Path, ids: Path) -> tuple[float, int]:
    """What `resmoe-dist evaluate` finds."""
    config = EvaluateConfig(model=folder, token_ids=ids)
    served = command.read_model(config)
    result = command.run_evaluate(config, served, command.read_sequences(config, served))
    return result.nll, result.tokens


class CompressedFolder:
    """A small compressed model and what it gives."""

    def __init__(self, work: Path) -> None:
        self.work, self.ids = work, work / "ids.json"
        self.ids.write_text(IDS)
        save_family(FAMILIES["mixtral"], work / "source")
        compress_folder(work / "source", work / "pristine", groups=2)
        self.logits = logits_of(load_model(work / "pristine"))
        self.nll = evaluation(work / "pristine", self.ids)

    def check(self, seed: int) -> str:
        """Damage a copy and see. Raises FaultError."""
        folder = self.work / "damaged"
        _copy(self.work / "pristine", folder)
        how = mutate(folder, seed)
        try:
            verified, faults = attempt("verify", lambda: CompressedCheckpoint(folder).faults())
            evaluated, nll = attempt("evaluate", lambda: evaluation(folder, self.ids))
            loaded, model = attempt("load_model", lambda: load_model(folder))
            sound = verified == "ok" and not faults
            if sound and evaluated == "ok" and nll != self.nll:
                raise FaultError(f"evaluate: {nll} instead of {self.nll}, unnoticed")
            if sound and loaded == "ok" and not torch.equal(logits_of(model), self.logits):
                raise FaultError("load_model: other logits, unnoticed")
            if "ok" in (evaluated, loaded):
                return "served, nothing to notice" if sound else "served, found by verify"
            return "refused"
        except FaultError as failure:
            raise FaultError(f"{seed} {how}\n{failure}") from failure


class SourceFolder:
    """A small source model."""

    def __init__(self, work: Path) -> None:
        self.work, self.ids = work, work / "ids.json"
        self.ids.write_text(IDS)
        save_family(FAMILIES["mixtral"], work / "pristine")

    def check(self, seed: int) -> str:
        """Compress a damaged copy, and evaluate what comes out. Raises FaultError."""
        folder, output = self.work / "damaged", self.work / "output"
        _copy(self.work / "pristine", folder)
        for left in self.work.glob("output*"):
            shutil.rmtree(left)
        how = mutate(folder, seed)
        config = CompressConfig(source=folder, output=output, ep=2)
        try:
            done, _ = attempt("compress", lambda: compress(config))
            if done == "refused":
                if left := [path.name for path in self.work.glob("output*")]:
                    raise FaultError(f"compress: refused, and left {left}")
                return "refused"
            _, faults = attempt("verify", lambda: CompressedCheckpoint(output).faults())
            if faults:
                raise FaultError(f"verify of the result: {faults}")
            served, _ = attempt("evaluate", lambda: evaluation(output, self.ids))
            return "compressed" if served == "ok" else "compressed, refused by evaluate"
        except FaultError as failure:
            raise FaultError(f"{seed} {how}\n{failure}") from failure


def _copy(folder: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)


FOLDERS = {"compressed": CompressedFolder, "source": SourceFolder}


def main() -> None:
    """Check `--count` mutations; exit code 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=FOLDERS)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    args = parser.parse_args()
    quiet_libraries()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as work, open(os.devnull, "w") as nowhere:
        folder = FOLDERS[args.kind](Path(work))
        shown, sys.stderr = sys.stderr, nowhere
        for seed in range(args.first, args.first + args.count):
            try:
                counts[folder.check(seed)] += 1
            except FaultError as failure:
                counts["FAILED"] += 1
                print(f"--- {failure}", flush=True)
            if (seed + 1) % 500 == 0:
                print(f"{seed + 1}: {dict(counts)}", file=shown, flush=True)
    print(dict(counts))
    sys.exit(bool(counts["FAILED"]))


if __name__ == "__main__":
    main()
