"""Why a grid ends: the causes that ranks can notice, and which of several is reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum


class Kind(IntEnum):
    """What happened. If ranks notice several, the lowest is reported: it explains the others."""

    RAISED = 0  # a rank reports an error
    LOST = 1  # a rank was killed, ended by itself, or does not join
    VANISHED = 2  # a rank ended, and how is not known
    SILENT = 3  # a rank stopped responding
    LAUNCHER = 4  # the launcher of a rank ended
    TERMINATED = 5  # a rank was lost to SIGTERM, which launchers send after another failure
    INTERRUPTED = 6  # a rank got SIGINT or SIGTERM and is leaving


@dataclass(frozen=True, order=True)
class Cause:
    """One reason to end.

    rank: whom it is about. code: exit code of the ranks. text: the line to print, "" for none.
    """

    kind: Kind
    rank: int
    code: int
    text: str

    def packed(self) -> list[int | str]:
        """As values of JSON."""
        return list(astuple(self))

    @classmethod
    def unpacked(cls, values: list) -> Cause:
        """The inverse of `packed`."""
        kind, rank, code, text = values
        return cls(Kind(kind), rank, code, text)


def lost(rank: int, ending: str | None) -> Cause:
    """A rank whose connection closed. ending: how the process ended, if known."""
    if ending is None:
        return Cause(Kind.VANISHED, rank, 1, f"error: rank {rank} ended without a message")
    kind = Kind.TERMINATED if ending.endswith("SIGTERM") else Kind.LOST
    hint = ""
    if ending.endswith("SIGKILL"):
        hint = " (if no one did this, the host ran out of memory)"
    return Cause(kind, rank, 1, f"error: rank {rank} {ending}{hint}")


def absent(rank: int) -> Cause:
    """A rank that is done, or leaves its work to others, while others wait for it."""
    text = f"error: rank {rank} does not join the others; start all ranks alike"
    return Cause(Kind.LOST, rank, 2, text)


def silent(rank: int, seconds: float) -> Cause:
    """A rank that has not been heard for `seconds`."""
    text = f"error: rank {rank} stopped responding for {seconds:g} s (see --rank-timeout)"
    return Cause(Kind.SILENT, rank, 1, text)


def launcher_gone(rank: int, pid: int) -> Cause:
    """The launcher of a rank has ended."""
    text = f"error: the launcher of rank {rank} ended (process {pid}); all ranks end"
    return Cause(Kind.LAUNCHER, rank, 1, text)


def command_gone(rank: int, launcher: int) -> Cause:
    """The command that started a rank's launcher has ended."""
    text = f"error: the launcher of rank {rank} ended (parent of process {launcher}); all ranks end"
    return Cause(Kind.LAUNCHER, rank, 1, text)


def interrupted(rank: int, code: int, missing: Sequence[int] = ()) -> Cause:
    """A rank that leaves with `code` because of a signal. Ctrl-C needs no explanation.

    missing: ranks that have not started: a launcher ends the others if one dies at once.
    """
    text = f"error: rank {rank} was ended by SIGTERM" if code == 143 else ""
    if text and missing:
        text += f" before rank {', '.join(map(str, missing))} had started"
    return Cause(Kind.INTERRUPTED, rank, code, text)
