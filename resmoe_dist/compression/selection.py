"""Exact order statistics of more values than fit in memory, computed block by block.

Legend: E dependent values in a column of a sample, S independent columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from resmoe_dist.compression.threads import in_parallel

Block = TypeVar("Block")

# Half the width of the bracket, in standard deviations of the sample's error.
_BRACKET_DEVIATIONS = 6.0


@dataclass(frozen=True)
class OrderStatistic:
    """value: the order statistic. ties[b]: how many entries of block b that are equal to `value`
    are among the smallest `rank` values."""

    value: float
    ties: list[int]


def order_statistic(
    sample_ES: Tensor,
    values_of: Callable[[Block], Tensor],
    blocks: Callable[[], Iterable[Block]],
    total: int,
    rank: int,
    *,
    device: torch.device,
) -> OrderStatistic:
    """The `rank`-th smallest (from 1) of `total` values. Equal values rank in the order of blocks.

    sample_ES: a sample of the values. The values of a column may depend on each other (those of one
    entry, for example); the columns are independent. blocks: starts a pass over all blocks; each
    pass must yield the same ones. values_of: the values of a block, on `device`.

    The sample gives a bracket that very likely contains the result. One pass counts the values
    below the bracket and collects those inside it. If the result is outside, the bracket is widened
    and another pass follows.
    """
    assert 1 <= rank <= total
    sample = sample_ES.flatten().sort().values
    middle = rank / total * sample.numel()
    # The standard deviation of the position in the sample is at most E/2·√S.
    margin = _BRACKET_DEVIATIONS * 0.5 * math.sqrt(sample.numel() * sample_ES.shape[0])
    while True:
        low = _value_at(sample, middle - margin)
        high = _value_at(sample, middle + margin)

        def count(block: Block, low: float = low, high: float = high) -> _BlockCounts:
            return _BlockCounts.of(values_of(block), low, high)

        counts = list(in_parallel(count, blocks(), device=device))
        found = _find_in_bracket(counts, low, high, rank)
        if found is not None:
            value, ties = found
            return OrderStatistic(value, _distribute(ties, [c.equal_to(value) for c in counts]))
        margin *= 8


def _distribute(total: int, limits: list[int]) -> list[int]:
    """Split `total` over the limits in order, each filled before the next."""
    parts = []
    for limit in limits:
        parts.append(min(total, limit))
        total -= parts[-1]
    return parts


@dataclass(frozen=True)
class _BlockCounts:
    """One block's values relative to the bracket [low, high].

    below, at_low, at_high: how many are below the bracket or equal to one of its ends. The ends are
    counted rather than collected because they may be very common. between: all other values in the
    bracket.
    """

    low: float
    high: float
    below: int
    at_low: int
    at_high: int
    between: Tensor

    @classmethod
    def of(cls, values: Tensor, low: float, high: float) -> _BlockCounts:
        candidates = values[(values >= low) & (values <= high)]
        return cls(
            low=low,
            high=high,
            below=int((values < low).sum()),
            at_low=int((candidates == low).sum()),
            at_high=int((candidates == high).sum()),
            between=candidates[(candidates > low) & (candidates < high)],
        )

    def equal_to(self, value: float) -> int:
        """How many values are equal to `value`, a value in the bracket."""
        if value == self.low:
            return self.at_low
        return self.at_high if value == self.high else int((self.between == value).sum())


def _value_at(sorted_values: Tensor, position: float) -> float:
    """The value at a position; infinite outside the tensor."""
    if position < 0:
        return -math.inf
    if position >= sorted_values.numel():
        return math.inf
    return float(sorted_values[int(position)])


def _find_in_bracket(
    counts: list[_BlockCounts], low: float, high: float, rank: int
) -> tuple[float, int] | None:
    """The value of rank `rank`, and its rank (from 1) among the values equal to it.

    None if the value is outside [low, high].
    """
    rank -= sum(block.below for block in counts)
    if rank < 1:
        return None
    at_low = sum(block.at_low for block in counts)
    if rank <= at_low:
        return low, rank
    rank -= at_low
    between = torch.cat([block.between for block in counts])
    if rank <= between.numel():
        value = between.kthvalue(rank).values
        return float(value), rank - int((between < value).sum())
    rank -= between.numel()
    if low != high and rank <= sum(block.at_high for block in counts):
        return high, rank
    return None
