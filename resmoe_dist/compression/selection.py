"""Exact order statistics of values that are too many to hold, made block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from resmoe_dist.compression.threads import in_parallel

Block = TypeVar("Block")

# Half the bracket around the wanted value, in standard deviations of the sample's error.
_BRACKET = 6.0


@dataclass(frozen=True)
class OrderStatistic:
    """value: the wanted one. ties: of its equals in each block, how many have no higher rank."""

    value: float
    ties: list[int]


def order_statistic(
    sample_CS: Tensor,
    values_in: Callable[[Block], Tensor],
    blocks: Callable[[], Iterable[Block]],
    total: int,
    rank: int,
    *,
    device: torch.device,
) -> OrderStatistic:
    """The rank-th smallest (from 1) of `total` values; equals rank in the order of the blocks.

    sample_CS: some of the values; those of a column belong together (of one entry, say), columns
    are independent. blocks and values_in: make all the values, the same ones each time; on
    `device`. The sample tells between which two values the wanted one will be; one pass counts
    those below and keeps those between. In the rare case that it was not there, the bracket is
    widened.
    """
    assert 1 <= rank <= total
    sample = sample_CS.flatten().sort().values
    middle = rank / total * sample.numel()
    # The share below is wrong by at most σ = C/2·√S entries of the sample.
    margin = _BRACKET * 0.5 * math.sqrt(sample.numel() * sample_CS.shape[0])
    while True:
        low = _at(sample, middle - margin)
        high = _at(sample, middle + margin)

        def look(block: Block, low: float = low, high: float = high) -> _Found:
            return _Found.among(values_in(block), low, high)

        parts = list(in_parallel(look, blocks(), device=device))
        found = _within(parts, low, high, rank)
        if found is not None:
            value, at = found
            return OrderStatistic(value, _dealt(at, [part.equals(value) for part in parts]))
        margin *= 8


def _dealt(count: int, at_most: list[int]) -> list[int]:
    """`count` dealt out in order, to each at most so many."""
    dealt = []
    for most in at_most:
        dealt.append(min(count, most))
        count -= dealt[-1]
    return dealt


@dataclass(frozen=True)
class _Found:
    """Of one block: how many values are below the bracket, how many are its ends, and the rest."""

    low: float
    high: float
    below: int
    at_low: int
    at_high: int
    between: Tensor

    def equals(self, value: float) -> int:
        """How many values are `value`, which is one in the bracket."""
        if value == self.low:
            return self.at_low
        return self.at_high if value == self.high else int((self.between == value).sum())

    @classmethod
    def among(cls, values: Tensor, low: float, high: float) -> _Found:
        """The ends are counted and not kept: they may be very common."""
        candidates = values[(values >= low) & (values <= high)]
        return cls(
            low=low,
            high=high,
            below=int((values < low).sum()),
            at_low=int((candidates == low).sum()),
            at_high=int((candidates == high).sum()),
            between=candidates[(candidates > low) & (candidates < high)],
        )


def _at(sorted_values: Tensor, position: float) -> float:
    if position < 0:
        return -math.inf
    if position >= sorted_values.numel():
        return math.inf
    return float(sorted_values[int(position)])


def _within(parts: list[_Found], low: float, high: float, rank: int) -> tuple[float, int] | None:
    """The wanted value if it is in [low, high], and which one (from 1) it is of its equals."""
    rank -= sum(part.below for part in parts)
    if rank < 1:
        return None
    at_low = sum(part.at_low for part in parts)
    if rank <= at_low:
        return low, rank
    rank -= at_low
    inside = torch.cat([part.between for part in parts])
    if rank <= inside.numel():
        value = inside.kthvalue(rank).values
        return float(value), rank - int((inside < value).sum())
    rank -= inside.numel()
    if low != high and rank <= sum(part.at_high for part in parts):
        return high, rank
    return None
