"""Order statistics against sorting, with good and misleading samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resmoe_dist.compression.selection import order_statistic


def _blocks(values: Tensor, size: int) -> tuple[Callable[[], Iterator[Tensor]], list[int]]:
    """A function that yields the values in blocks, and a list with one item per call to it."""
    passes: list[int] = []

    def blocks() -> Iterator[Tensor]:
        passes.append(1)
        yield from values.split(size)

    return blocks, passes


def _found(
    sample: Tensor, blocks: Callable[[], Iterator[Tensor]], total: int, rank: int
) -> tuple[float, int]:
    """The value of rank `rank`, and its rank among the values equal to it.

    Asserts that ties are taken from the first blocks on.
    """
    found = order_statistic(
        sample, lambda block: block, blocks, total, rank, device=torch.device("cpu")
    )
    equal = [int((block == found.value).sum()) for block in blocks()]
    left = sum(found.ties)
    for ties, available in zip(found.ties, equal, strict=True):
        assert ties == min(left, available)
        left -= ties
    return found.value, sum(found.ties)


def _expected(values: Tensor, rank: int) -> tuple[float, int]:
    """The same by sorting and counting."""
    ordered = np.sort(values.numpy())
    value = ordered[rank - 1]
    return float(value), rank - int((ordered < value).sum())


def _samples(values: Tensor, entries: int) -> dict[str, Tensor]:
    """Samples [1, entries] or [5, entries / 5]: representative ones and misleading ones."""
    ordered = values.sort().values
    return {
        "random": values[torch.randperm(len(values))[:entries]].view(1, -1),
        "of columns": values[torch.randperm(len(values))[:entries]].view(5, -1),
        "the smallest": ordered[:entries].view(1, -1),
        "the largest": ordered[-entries:].view(1, -1),
        "the smallest alone": ordered[:1].repeat(1, entries),
        "the median alone": ordered[len(values) // 2 : len(values) // 2 + 1].repeat(1, entries),
        "from elsewhere": 100 + torch.rand(1, entries),
    }


@pytest.mark.parametrize("kind", ["all differ", "heavy ties", "mostly zeros", "all equal"])
@pytest.mark.parametrize("size", [70, 10**6])
def test_every_rank_is_found_with_every_sample(kind, size):
    values = torch.randn(6000)
    if kind == "heavy ties":
        values = values.round()
    elif kind == "mostly zeros":
        values[: 6000 * 9 // 10] = 0
        values = values[torch.randperm(6000)].abs()
    elif kind == "all equal":
        values = torch.full((6000,), 0.1)

    for name, sample in _samples(values, 500).items():
        for rank in (1, 2, 600, 3000, 3001, 3002, 5400, 5401, 5999, 6000):
            found = _found(sample, _blocks(values, size)[0], 6000, rank)
            assert found == _expected(values, rank), (name, rank)


@given(data=st.data(), total=st.integers(2, 40), spread=st.integers(0, 12))
@settings(deadline=None)
def test_ties_are_counted_exactly(data, total, spread):
    drawn = data.draw(st.lists(st.integers(-spread, spread), min_size=total, max_size=total))
    values = torch.tensor(drawn, dtype=torch.float32)
    sample = values[: data.draw(st.integers(1, total))].view(1, -1)
    rank = data.draw(st.integers(1, total))

    found = _found(sample, _blocks(values, 3)[0], total, rank)

    assert found == _expected(values, rank)


def test_representative_sample_needs_one_pass():
    values = torch.randn(100_000)
    blocks, passes = _blocks(values, 5000)

    for rank in (1, 25_000, 99_999):
        passes.clear()
        sample = values[::10].view(1, -1)
        assert _found(sample, blocks, 100_000, rank) == _expected(values, rank)
        assert len(passes) == 2  # one of them is this test's own, to check the ties


def test_misleading_sample_needs_more_passes():
    values = torch.arange(100_000.0)
    blocks, passes = _blocks(values, 5000)

    found = _found(values[:1000].view(1, -1), blocks, 100_000, 50_000)

    assert found == (49_999.0, 1)
    assert len(passes) > 2
