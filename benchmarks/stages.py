"""Where the time of one MoE layer goes: router, dispatch, experts, combine.

Read from the moments at which the router and the experts are entered and left. Dispatch is all
that happens between the two, combine all that follows the experts; both include waiting for slower
ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

from torch import nn

STAGES = ("router", "dispatch", "experts", "combine")


def stage_seconds(
    call: Callable[[], object], router: nn.Module, experts: nn.Module
) -> dict[str, float]:
    """Seconds of each stage of one call that runs each of the modules once."""
    moments: list[float] = []

    def note(*_: object) -> None:
        moments.append(time.perf_counter())

    with ExitStack() as stack:
        for module in (router, experts):
            stack.callback(module.register_forward_pre_hook(note).remove)
            stack.callback(module.register_forward_hook(note).remove)
        call()
    note()
    assert len(moments) == 5, "the router and the experts must each run once"
    router_began, routed, experts_began, computed, ended = moments
    return {
        "router": routed - router_began,
        "dispatch": experts_began - routed,
        "experts": computed - experts_began,
        "combine": ended - computed,
    }
