"""launch/infer.py with a fault of one rank at its n-th MoE layer call; for `faults`.

The variable FAULT holds `KIND:RANK:CALL`: raise, memory, stop or kill.
"""

from __future__ import annotations

import itertools
import os
import signal
from typing import Any

from resmoe_dist.parallel.entry_point import launched_rank, run_entry_point


def main() -> int | None:
    """One rank."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    from resmoe_dist.launch.infer import run
    from resmoe_dist.runtime.layer import ResMoE

    kind, rank, call = os.environ["FAULT"].split(":")
    calls = itertools.count()

    def fail(module: Any, _: Any) -> None:
        if not isinstance(module, ResMoE) or next(calls) != int(call):
            return
        if kind == "raise":
            raise ValueError("injected fault")
        if kind == "memory":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[kind])

    if launched_rank() == int(rank):
        register_module_forward_pre_hook(fail)
    return run()


if __name__ == "__main__":
    run_entry_point(main)
