"""Compress runs for tests: their defaults, what they leave, and ranks that are slow on purpose."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from resmoe_dist.checkpoints.format import CheckpointIndex, CompressionSettings
from resmoe_dist.checkpoints.source import SourceCheckpoint
from resmoe_dist.jobs.pipeline import Compression
from resmoe_dist.jobs.scheduling import Workers
from tests.compress_settings import compression_settings

REPOSITORY = Path(__file__).parents[2]
# launch/compress.py, with a pause before each task.
SLOW_COMPRESS = Path(__file__).parent / "slow_compress.py"
# `settings()`, for the command.
COMMAND_OPTIONS = ("--ep", 2, "--center", "joint")
# What a source of two layers becomes.
GROUP_FILES = [
    f"resmoe-{layer:05d}-of-00002-group-{group:03d}.safetensors"
    for layer in (1, 2)
    for group in (0, 1)
]


def settings(**changes: Any) -> CompressionSettings:
    """Both layers, two groups, a quarter kept; and `changes`."""
    return compression_settings(**({"groups": 2, "layers": [0, 1]} | changes))


def run(
    source: Path,
    output: Path,
    workers: Workers | None = None,
    *,
    resume: bool = False,
    **changes: Any,
) -> CheckpointIndex:
    """One run with `settings(**changes)`."""
    compression = Compression(SourceCheckpoint(source), output, settings(**changes), workers)
    return compression.run(resume=resume)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def staging_of(output: Path) -> Path:
    """Where a run works on `output`."""
    return output.with_name(f"{output.name}.partial")


def finished_in(output: Path) -> set[str]:
    """Tensor files that an unfinished run has made."""
    return {path.name for path in (staging_of(output) / "model").glob("[!.]*.safetensors")}


def before_each_task(patch: pytest.MonkeyPatch, action: Callable[[Compression], Any]) -> None:
    """Have `action(compression)` called before every task of the last phase."""
    for name in ("compress_group", "copy_shard"):
        patch.setattr(Compression, name, _after(action, getattr(Compression, name)))


def _after(action: Callable[[Compression], Any], do: Callable[..., Any]) -> Callable[..., Any]:
    def act_and_do(self: Compression, *args: Any) -> Any:
        action(self)
        return do(self, *args)

    return act_and_do


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Return as soon as `condition()` holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def start_process(function: Callable[..., Any], *args: Any) -> multiprocessing.process.BaseProcess:
    """`function(*args)` in a process of its own, which starts in no time."""
    import tests.ranks  # noqa: F401  (has the fork server import what is heavy, once)

    process = multiprocessing.get_context("forkserver").Process(target=function, args=args)
    process.start()
    return process


def start_command(*command: object) -> subprocess.Popen[str]:
    """Start a command with this Python's environment first in the path; skip if there is none."""
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
    """Exit code, standard output and standard error of a started command."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        end_command(process)
    return process.returncode, out, err


def end_command(process: subprocess.Popen[str]) -> None:
    """End a started command and whatever it started in its own process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
