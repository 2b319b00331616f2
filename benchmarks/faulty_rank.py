"""launch/infer.py with a fault inside one rank; for `faults`.

The variable FAULT holds a `Fault` as JSON. It says which rank is faulty and how.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resmoe_dist.parallel.entry_point import launched_rank, run_entry_point

VARIABLE = "FAULT"
# What a rank may still allocate under `limit`, and the pieces in which it does.
_LEFT_BYTES, _PIECE_BYTES = 64 << 20, 1 << 20
# More than an address space holds.
_ABSURD_ELEMENTS = 1 << 60
# Options that all ranks must have been given alike, and another value for each.
_OPTIONS = (
    ("--seed", "7"),
    ("--max-new-tokens", "17"),
    ("--temperature", "0.5"),
    ("--dispatch", "exchange"),
    ("--check",),
    ("--ep", "1"),
)
_VERSIONS = ("torch", "transformers", "deepspeed")


@dataclass(frozen=True)
class Fault:
    """One fault.

    kind: one of FAULTS. number: of the MoE layer's call at which a fault in a layer happens, or
    which of several variants is meant. folder: another model's, for the kinds that need one.
    """

    kind: str
    rank: int
    number: int
    folder: str

    def environment(self) -> dict[str, str]:
        """The variable that tells the ranks."""
        return {VARIABLE: json.dumps(asdict(self))}


def _in_layer(act: Callable[[Any], None]) -> Callable[[Fault], None]:
    """A fault at the chosen call of a MoE layer. act: gets the transformers block around it."""

    def install(fault: Fault) -> None:
        from torch.nn.modules.module import register_module_forward_pre_hook

        from resmoe_dist.runtime.layer import ResMoE

        calls = itertools.count()

        def count(module: Any, _: Any) -> None:
            is_block = isinstance(getattr(module, "experts", None), ResMoE)
            if is_block and next(calls) == fault.number:
                act(module)

        register_module_forward_pre_hook(count)

    return install


def _raise(_: Any) -> None:
    raise ValueError("injected fault")


def _allocate_too_much(_: Any) -> None:
    import torch

    torch.empty(_ABSURD_ELEMENTS, dtype=torch.int8)


def _exhaust_memory(_: Any) -> None:
    """Fill the address space up to a limit, and keep it full."""
    import torch

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _LEFT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        _kept.append(torch.ones(_PIECE_BYTES, dtype=torch.uint8))


_kept: list[Any] = []


def _change_router(block: Any) -> None:
    block.gate.weight.data[0] += 0.5


def _damage_experts(block: Any) -> None:
    # Not their weights: kernels may keep a copy.
    block.experts.experts.register_forward_hook(lambda module, args, y_RH: y_RH * math.nan)


def _change_option(fault: Fault) -> None:
    sys.argv += _OPTIONS[fault.number % len(_OPTIONS)]


def _ask_for_more_ranks(_: Fault) -> None:
    """On a machine without accelerators, a rank that misses others starts them."""
    sys.argv += ["--tp", "2"]


def _change_version(fault: Fault) -> None:
    """Let the metadata of one library give another version."""
    found, other = importlib.metadata.version, _VERSIONS[fault.number % len(_VERSIONS)]
    importlib.metadata.version = lambda name: "9.9.9" if name == other else found(name)


def _change_folder(fault: Fault) -> None:
    sys.argv[sys.argv.index("--model") + 1] = fault.folder


def _send(number: signal.Signals) -> Callable[[Any], None]:
    return lambda _: os.kill(os.getpid(), number)


# What installs each kind, before anything else runs in the faulty rank.
FAULTS: dict[str, Callable[[Fault], None]] = {
    "raise": _in_layer(_raise),
    "memory": _in_layer(_allocate_too_much),
    "limit": _in_layer(_exhaust_memory),
    "routing": _in_layer(_change_router),
    "values": _in_layer(_damage_experts),
    "stop-in-layer": _in_layer(_send(signal.SIGSTOP)),
    "kill-in-layer": _in_layer(_send(signal.SIGKILL)),
    "options": _change_option,
    "grid": _ask_for_more_ranks,
    "versions": _change_version,
    "checkpoint": _change_folder,
    "missing": _change_folder,
}


def main() -> int | None:
    """One rank."""
    fault = Fault(**json.loads(os.environ[VARIABLE]))
    if launched_rank() == fault.rank:
        FAULTS[fault.kind](fault)
    from resmoe_dist.launch.infer import run

    return run()


if __name__ == "__main__":
    run_entry_point(main)
