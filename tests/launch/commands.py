"""Running launch scripts as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def start(*arguments: str | Path) -> subprocess.Popen:
    """A command that runs in the repository, as from a shell that no launcher started."""
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        environment.pop(name, None)
    return subprocess.Popen(
        [str(argument) for argument in arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    process = start(*arguments)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def own_lines(text: str) -> list[str]:
    """Lines that are not DeepSpeed's log."""
    return [line for line in text.splitlines() if line and not line.startswith("[20")]
