"""Exact order statistics of values that are too many to hold, made block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Half the bracket around the wanted value, in standard deviations of the sample's error.
_BRACKET = 6.0


def order_statistic(
    sample_CS: Tensor, blocks: Callable[[], Iterable[Tensor]], total: int, rank: int
) -> tuple[float, int]:
    """The rank-th smallest (from 1) of `total` values, and which one (from 1) it is of its equals.

    sample_CS: some of the values, or all of them; those of a column belong together (of one entry,
    say), columns are independent. blocks: makes all the values, the same ones each time it is
    called. The sample tells between which two values the wanted one will be; one pass counts those
    below and keeps those between. In the rare case that it was not there, the bracket is widened.
    """
    assert 1 <= rank <= total
    sample = sample_CS.flatten().sort().values
    if sample.numel() == total:
        value = sample[rank - 1]
        return float(value), rank - int(torch.searchsorted(sample, value))
    middle = rank / total * sample.numel()
    # The share below is wrong by at most σ = C/2·√S entries of the sample.
    margin = _BRACKET * 0.5 * math.sqrt(sample.numel() * sample_CS.shape[0])
    while True:
        low = _at(sample, middle - margin)
        high = _at(sample, middle + margin)
        found = _within(blocks(), low, high, rank)
        if found is not None:
            return found
        margin *= 8


def _at(sorted_values: Tensor, position: float) -> float:
    if position < 0:
        return -math.inf
    if position >= sorted_values.numel():
        return math.inf
    return float(sorted_values[int(position)])


def _within(
    blocks: Iterable[Tensor], low: float, high: float, rank: int
) -> tuple[float, int] | None:
    """`order_statistic` if it is in [low, high]. The ends are counted: they may be very common."""
    below = at_low = at_high = 0
    between = []
    for values in blocks:
        candidates = values[(values >= low) & (values <= high)]
        below += int((values < low).sum())
        at_low += int((candidates == low).sum())
        at_high += int((candidates == high).sum())
        between.append(candidates[(candidates > low) & (candidates < high)])
    rank -= below
    if rank < 1:
        return None
    if rank <= at_low:
        return low, rank
    rank -= at_low
    inside = torch.cat(between)
    if rank <= inside.numel():
        value = inside.kthvalue(rank).values
        return float(value), rank - int((inside < value).sum())
    rank -= inside.numel()
    if low != high and rank <= at_high:
        return high, rank
    return None
