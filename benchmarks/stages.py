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


def stage_seconds(
    call: Callable[[], object], layers: Iterable[LayerParts]
) -> list[dict[str, float]]:
    """Seconds of each stage, for every time that `call` runs one of the layers, in order."""
    found: list[dict[str, float]] = []
    with ExitStack() as stack:
        for parts in layers:
            _watch(parts, found, stack)
        call()
    return found


def _watch(parts: LayerParts, found: list[dict[str, float]], stack: ExitStack) -> None:
    """Append the stages of each call of a layer to `found`, until the stack is left."""
    entered: dict[nn.Module, float] = {}
    left: dict[nn.Module, float] = {}

    def enter(module: nn.Module, *_: object) -> None:
        entered[module] = time.perf_counter()

    def leave(module: nn.Module, *_: object) -> None:
        left[module] = time.perf_counter()
        if module is parts.block:
            found.append(
                {
                    "router": left[parts.router] - entered[parts.router],
                    "dispatch": entered[parts.experts] - left[parts.router],
                    "experts": left[parts.experts] - entered[parts.experts],
                    "combine": left[parts.block] - left[parts.experts],
                }
            )

    for module in (parts.block, parts.router, parts.experts):
        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave).remove)
