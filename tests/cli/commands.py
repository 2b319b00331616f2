"""Running the installed command, and checking outcomes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

COMMAND = Path(sys.executable).parent / "resmoe-dist"
GROUP = "resmoe-00001-of-00002-group-000.safetensors"


class Outcome(NamedTuple):
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str


def start(*arguments) -> Outcome:
    """The outcome of the installed command, run in its own process."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [str(COMMAND), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def assert_mistake(outcome: Outcome, text: str) -> None:
    """Exit code 2 and one line on standard error that contains `text`."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert text in outcome.err
