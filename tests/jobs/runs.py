"""Compress runs for tests: default settings, the files they leave, and how to interrupt them."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from resmoe_dist.checkpoints.format import CheckpointIndex, CompressionSettings
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.jobs.claims import Claims
from resmoe_dist.jobs.pipeline import Compression
from resmoe_dist.jobs.scheduling import Schedule
from resmoe_dist.jobs.staging import StagingFolder
from resmoe_dist.jobs.workers import Workers
from tests.compress_settings import compression_settings

REPOSITORY = Path(__file__).parents[2]
# launch/compress.py, with a pause before each task.
SLOW_COMPRESS = Path(__file__).parent / "slow_compress.py"
# `settings()`, for the command.
COMMAND_OPTIONS = ("--ep", 2, "--center", "joint")
# What identifies a run, for tests of the staging folder alone.
IDENTITY = {"keep": 0.25, "source": "this", "producer": "us"}
# The group files of a source of two layers.
GROUP_FILES = [
    f"resmoe-{layer:05d}-of-00002-group-{group:03d}.safetensors"
    for layer in (1, 2)
    for group in (0, 1)
]


def settings(**changes: Any) -> CompressionSettings:
    """Settings with both layers, two groups and a quarter kept, overridden by `changes`."""
    return compression_settings(**({"groups": 2, "layers": [0, 1]} | changes))


def run(
    source: Path,
    output: Path,
    workers: Workers | None = None,
    *,
    resume: bool = False,
    **changes: Any,
) -> CheckpointIndex:
    """Run one compression with `settings(**changes)`."""
    compression = Compression(SourceCheckpoint(source), output, settings(**changes), workers)
    return compression.run(resume=resume)


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def staging_of(output: Path) -> Path:
    """The folder in which a run works before it makes `output`."""
    return output.with_name(f"{output.name}.partial")


def finished_in(output: Path) -> set[str]:
    """Names of the tensor files that an unfinished run has finished."""
    return {path.name for path in (staging_of(output) / "model").glob("[!.]*.safetensors")}


def before_each_task(patch: pytest.MonkeyPatch, action: Callable[[Workers], Any]) -> None:
    """Call `action(workers)` before each task of the last phase, which writes the files."""
    run_phase = Schedule.run_phase

    def run_phase_with_action(
        self: Schedule, name: str, tasks: Sequence[Any], run_task: Callable[[Any], Any], *args: Any
    ) -> dict[Any, Any]:
        def act_and_run(task: Any) -> Any:
            action(self.workers)
            return run_task(task)

        run = act_and_run if name == "compressing" else run_task
        return run_phase(self, name, tasks, run, *args)

    patch.setattr(Schedule, "run_phase", run_phase_with_action)


def interrupt_run(source: Path, output: Path, patch: pytest.MonkeyPatch, tasks: int = 3) -> Path:
    """Run until Ctrl-C after `tasks` of four groups and two copies; return the staging folder."""
    started = []

    def interrupt(workers: Workers) -> None:
        if len(started) == tasks:
            raise KeyboardInterrupt
        started.append(workers)

    with patch.context() as context:
        before_each_task(context, interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"^interrupted; continue with --resume$"):
            run(source, output)
    return staging_of(output)


def acquire_staging(output: Path, *, resume: bool = False) -> tuple[StagingFolder, Claims | None]:
    """Acquire the staging folder of a run of `IDENTITY`; return it and the run's claims."""
    folder = StagingFolder(output)
    return folder, folder.acquire(IDENTITY, resume=resume)


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Poll until `condition()` holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"condition did not hold within {seconds} s"
        time.sleep(0.02)


def start_process(function: Callable[..., Any], *args: Any) -> multiprocessing.process.BaseProcess:
    """Run `function(*args)` in a new process."""
    # tests.ranks lets the fork server import the heavy libraries once, so processes start fast.
    import tests.ranks  # noqa: F401

    process = multiprocessing.get_context("forkserver").Process(target=function, args=args)
    process.start()
    return process


def start_command(*command: object) -> subprocess.Popen[str]:
    """Start a command, found first beside this Python; skip the test if it is not installed."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if shutil.which(str(command[0]), path=tools) is None:
        pytest.skip(f"{command[0]} is not installed")
    environment = os.environ | {
        "PATH": tools,
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish_command(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str, str]:
    """Wait for a command; return its exit code, standard output and standard error."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        end_command(process)
    return process.returncode, out, err


def end_command(process: subprocess.Popen[str]) -> None:
    """Kill a command and the processes that it started in its process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
