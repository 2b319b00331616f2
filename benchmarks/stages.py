"""Where the time of MoE layers goes: router, dispatch, experts, combine.

Read from the moments at which a layer's router and experts are entered and left. Dispatch is all
that happens between the two, combine all that follows the experts. Both include waiting for slower
ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn

STAGES = ("router", "dispatch", "experts", "combine")


@dataclass(frozen=True)
class LayerParts:
    """The modules of one MoE layer: block calls router, then experts, once each."""

    block: nn.Module
    router: nn.Module
    experts: nn.Module


def stage_seconds(call: Callable[[], object], layers: Iterable[LayerParts]) -> dict[str, float]:
    """Seconds of each stage during `call`, over all layers."""
    total = dict.fromkeys(STAGES, 0.0)
    with ExitStack() as stack:
        for parts in layers:
            _watch(parts, total, stack)
        call()
    return total


def _watch(parts: LayerParts, total: dict[str, float], stack: ExitStack) -> None:
    """Add the stages of each call of a layer to `total`, until the stack is left."""
    entered: dict[nn.Module, float] = {}
    left: dict[nn.Module, float] = {}

    def enter(module: nn.Module, *_: object) -> None:
        entered[module] = time.perf_counter()

    def leave(module: nn.Module, *_: object) -> None:
        left[module] = time.perf_counter()
        if module is parts.block:
            total["router"] += left[parts.router] - entered[parts.router]
            total["dispatch"] += entered[parts.experts] - left[parts.router]
            total["experts"] += left[parts.experts] - entered[parts.experts]
            total["combine"] += left[parts.block] - left[parts.experts]

    for module in (parts.block, parts.router, parts.experts):
        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave).remove)
