"""Running launch scripts as a user does."""

from __future__ import annotations

from pathlib import Path

from tests.jobs.runs import finish_command, start_command


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    return finish_command(start_command(*arguments), timeout=240)


def own_lines(text: str) -> list[str]:
    """Lines that are not DeepSpeed's log."""
    return [line for line in text.splitlines() if line and not line.startswith("[20")]
