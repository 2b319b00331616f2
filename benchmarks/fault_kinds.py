"""The kinds of faults that `faults` injects, and the line that the ranks promise for each."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from benchmarks.faulty_rank import FAULTS
from resmoe_dist.testing.embedded import embedded_checkpoint

# What strikes from outside gets the launcher and the process id of the faulty rank.
Strike = Callable[["Popen[str]", int], None]


@dataclass(frozen=True)
class FaultKind:
    """One way to fail.

    what: for readers. line: the whole line that is due, as a regular expression; {rank} is the
    faulty rank, {other} any rank, {accused} and {named} see `expects`. code: exit code of the
    launcher, None for any but 0. options: of launch/infer.py. strike: what happens from outside at
    the chosen moment; None if the fault comes from inside. folder: makes the folder that the fault
    needs, from the model's folder, an empty place and the rank; damaged: all ranks load it.
    """

    what: str
    line: str
    code: int | None = None
    options: tuple[str, ...] = ()
    strike: Strike | None = None
    folder: Callable[[Path, Path, int], Path] | None = None
    damaged: bool = False

    def expects(self, line: str, rank: int, ranks: int) -> bool:
        """Whether a line is the one that is due.

        Of two ranks that differ nothing tells which is wrong: rank 1 is accused. Rank 0 is not
        named for a mistake that it finds before it joins the others.
        """
        accused = rank if ranks > 2 else 1
        named = f"rank {rank}: " if rank else ""
        pattern = self.line.format(rank=rank, accused=accused, named=named, other=r"\d+")
        return re.fullmatch(f"error: (?:{pattern})", line) is not None


def _signal(number: signal.Signals) -> Strike:
    return lambda _, pid: os.kill(pid, number)


def _truncated(model: Path, copy: Path, rank: int) -> Path:
    """A copy of a model in which the file of one EP rank is truncated."""
    shutil.copytree(model, copy)
    bad = sorted(copy.glob(f"resmoe-*-group-{rank:03d}.safetensors"))[0]
    bad.write_bytes(bad.read_bytes()[:-100])
    return copy


# A rank that dies at once was never met.
_KILLED = (
    r"rank {rank} (was killed by SIGKILL .*|ended without a message)"
    r"|rank \d+ was ended by SIGTERM before rank {rank} had started"
)
_SILENT = r"rank {rank} stopped responding for \S+ s .*"
_NO_MEMORY = r"rank {rank}: out of memory \(.*\); use more ranks .*"
_DISAGREES = r"rank {accused} disagrees with rank {other}: %s; start all ranks alike"
_IN_LAYER = r"in model\.layers\.\d+\.mlp\.experts, step \d+"
# The ranks of one lane must route alike.
_CHECKED = ("--check", "--lanes", "1")

KINDS = {
    "kill": FaultKind("SIGKILL", _KILLED, strike=_signal(signal.SIGKILL)),
    "stop": FaultKind("SIGSTOP", _SILENT, strike=_signal(signal.SIGSTOP)),
    "term": FaultKind(
        "SIGTERM",
        r"rank {rank} was ended by SIGTERM( before rank .*)?",
        143,
        strike=_signal(signal.SIGTERM),
    ),
    "launcher": FaultKind(
        "SIGTERM for the `deepspeed` command",
        r"the launcher of rank {other} ended \((parent of )?process \d+\); all ranks end",
        strike=lambda launcher, _: launcher.terminate(),
    ),
    "raise": FaultKind(
        "an exception in a layer",
        # The first steps try the folder, and count against it.
        r"rank {rank}( failed: ValueError: injected fault \(.*"
        r"|: .*: cannot generate \(ValueError: injected fault\).*)",
    ),
    "memory": FaultKind("a layer asks for more than there is", _NO_MEMORY, 1),
    "limit": FaultKind("a layer fills the address space up to RLIMIT_AS", _NO_MEMORY, 1),
    "kill-in-layer": FaultKind("SIGKILL in a layer", _KILLED),
    "stop-in-layer": FaultKind("SIGSTOP in a layer", _SILENT),
    "damage": FaultKind(
        "a truncated file that one rank opens",
        r"rank {rank}: \S*resmoe-\d+-of-\d+-group-\d+\.safetensors: .*",
        2,
        folder=_truncated,
        damaged=True,
    ),
    "options": FaultKind("an option of one rank differs", _DISAGREES % r"--\S+ is .*", 2),
    "grid": FaultKind(
        "one rank is asked for more ranks than there are",
        "rank {rank} does not join the others; start all ranks alike",
        2,
    ),
    "versions": FaultKind(
        "a library of one rank has another version", _DISAGREES % r"\w+ is .*9\.9\.9 on .*", 2
    ),
    "checkpoint": FaultKind(
        "one rank loads another model",
        _DISAGREES % r"the digest of the model's resmoe\.json is .*",
        2,
        folder=lambda model, place, rank: embedded_checkpoint(1),
    ),
    "missing": FaultKind(
        "one rank does not find the model's folder",
        r"{named}\S+: no such folder; .*",
        2,
        folder=lambda model, place, rank: place,
    ),
    "routing": FaultKind(
        "--check: a router of one rank changes while it serves",
        f"rank {{accused}} routes differently from rank {{other}} of its lane {_IN_LAYER}",
        1,
        _CHECKED,
    ),
    "values": FaultKind(
        "--check: NaN from one rank's experts",
        # The first steps try the folder: all ranks have the same logits, and any may be first.
        f"rank {{rank}}: the experts' output is not finite {_IN_LAYER}"
        r"|rank \d+: the model's logits are NaN; .*",
        None,
        _CHECKED,
    ),
}
# Those that a rank does to itself.
INSIDE = frozenset(FAULTS)
assert {name for name, kind in KINDS.items() if not (kind.strike or kind.damaged)} == INSIDE
