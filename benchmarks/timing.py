"""Fair timings: contenders take turns, every turn starts with cold caches, all repeats are kept."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Contenders = Mapping[str, Callable[[], object]]
# Of the repeats of one contender: see `summary`.
Summary = dict[str, Any]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Effort:
    """Limits that tests make smaller.

    evicting_bytes: read before every turn; several times the last-level cache. streamed_bytes: read
    to measure the memory's speed. least_repeats: made however long they take. too_slow: a contender
    this many times slower than the fastest gets no second turn. gathered_bytes: weights that
    `batched_mm` may copy at most. restored_bytes: dense experts restored at a time.
    """

    evicting_bytes: int = 256 << 20
    streamed_bytes: int = 1 << 30
    least_repeats: int = 3
    too_slow: float = 4
    gathered_bytes: int = 2 << 30
    restored_bytes: int = 1 << 30


class Clock:
    """Times contenders on one device.

    repeats: turns of each. seconds: a comparison begins no more turns after this time. now: returns
    the time in seconds.
    """

    def __init__(
        self,
        device: torch.device = CPU,
        repeats: int = 1,
        seconds: float = math.inf,
        seed: int = 0,
        effort: Effort | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device, self.effort, self.now = device, effort or Effort(), now
        self._repeats, self._seconds = repeats, seconds
        self._random = random.Random(seed)
        self._order: list[str] = []

    def timed(self, action: Callable[[], T]) -> tuple[T, float]:
        """What `action` returns, and its seconds."""
        began = self.now()
        result = action()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return result, self.elapsed(began)

    def elapsed(self, began: float) -> float:
        """Seconds since `began`, by which everything is decided."""
        return self.now() - began

    def evicting_bytes(self) -> int:
        """What is read before every turn."""
        return self.effort.evicting_bytes

    def turn(self, contenders: Contenders) -> dict[str, float]:
        """Seconds of one turn of each, with cold caches, in random order.

        Every second turn of the same contenders reverses the order of the turn before.
        """
        if sorted(self._order) == sorted(contenders):
            order, self._order = self._order[::-1], []
        else:
            order = self._order = self._random.sample(list(contenders), len(contenders))
        seconds = {}
        for name in order:
            # Read, not written: pending write-backs would be part of the contender's time.
            self.timed(self._evicting.sum)
            seconds[name] = self.timed(contenders[name])[1]
        return seconds

    def compare(
        self, prepare: Callable[[], Contenders], may_drop: Collection[str] = ()
    ) -> dict[str, Summary]:
        """Summary of the seconds of each contender over all repeats.

        prepare: returns the contenders of a repeat; not timed. may_drop: names of those that get a
        single turn if it is too slow (see `too_slow`).
        """
        taken: dict[str, list[float]] = {}
        dropped: set[str] = set()
        for _ in self.repeats():
            work = {name: act for name, act in prepare().items() if name not in dropped}
            turn = self.turn(work)
            for name in work:
                taken.setdefault(name, []).append(turn[name])
            dropped |= self.too_slow({name: turn[name] for name in work if name in may_drop})
        return {name: summary(seconds) for name, seconds in taken.items()}

    def repeats(self) -> Iterator[int]:
        """0, 1, … as often as the options say. Three are made (or all) despite a time limit."""
        began = self.now()
        for number in range(self._repeats):
            if number >= self.effort.least_repeats and self.elapsed(began) > self._seconds:
                return
            yield number

    def too_slow(self, seconds: Mapping[str, float]) -> set[str]:
        """Contenders so much slower than the fastest that chance does not explain it."""
        limit = self.effort.too_slow * min(seconds.values(), default=0)
        return {name for name, taken in seconds.items() if taken > limit}

    def memory_speed(self, repeats: int = 5) -> dict[str, float]:
        """Bytes per second that this many threads `read`, and that a `copy` reads plus writes.

        Reading is the faster of a sum and a dot product of two halves. Each is the fastest of
        `repeats`, after one that is not counted.
        """
        size = self.effort.streamed_bytes
        values = torch.ones(size // 4, device=self.device)
        halves = values.view(2, -1)
        work: Contenders = {
            "sum": values.view(torch.float64).sum,
            "dot": lambda: torch.dot(halves[0], halves[1]),
            "copy": lambda: halves[0].copy_(halves[1]),
        }
        turns = [self.turn(work) for _ in range(repeats + 1)][1:]
        least = {name: min(turn[name] for turn in turns) for name in work}
        return {"read": size / min(least["sum"], least["dot"]), "copy": size / least["copy"]}

    @cached_property
    def _evicting(self) -> Tensor:
        size = self.evicting_bytes() // 8
        return torch.ones(size, dtype=torch.float64, device=self.device)


def summary(values: Sequence[float]) -> Summary:
    """Median, least, most and all of the values."""
    ends = {"least": min(values), "most": max(values)}
    return {"median": statistics.median(values), **ends, "all": list(values)}


def medians(seconds: Mapping[str, Summary]) -> dict[str, float]:
    """The median of each contender."""
    return {name: found["median"] for name, found in seconds.items()}
