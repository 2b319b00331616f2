"""Padding and imbalance, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.loads import ExpertLoad, imbalance, load_of, padding_factor
from benchmarks.wire import WireCount, count_rows
from resmoe_dist.parallel.dispatch import DecodeDispatcher
from resmoe_dist.parallel.topology import build_topology
from resmoe_dist.routing import NO_EXPERT, RoutedTokens
from tests.ranks import run_on_ranks

ONE, NONE = [1.0, 2.0], [0.0, 0.0]


def test_routed_tokens_have_no_padding():
    index_TK = torch.tensor([[0, 2], [2, NO_EXPERT]])
    routed = RoutedTokens.from_routing(torch.ones(2, 2), index_TK, torch.ones(2, 2), 3)

    assert load_of(None, (routed,)) == ExpertLoad([1, 0, 2], [1, 0, 2])


def test_capacity_of_deepspeed_is_padding():
    # Two groups, two local experts, capacity 2.
    rows = torch.tensor([[[ONE, ONE], [ONE, NONE]], [[ONE, NONE], [NONE, NONE]]])

    assert load_of(None, (rows,)) == ExpertLoad([4, 4], [3, 1])


def test_alignment_of_autoep_is_padding():
    # Expert 0: two rows, one of them real. Expert 1: one row. The last row belongs to no expert.
    rows = torch.tensor([ONE, NONE, ONE, NONE])

    assert load_of(None, (rows, torch.tensor([2, 1]))) == ExpertLoad([2, 1], [1, 1])


def test_experts_of_other_ranks_are_not_computed_by_transformers():
    experts = SimpleNamespace(num_experts=2)
    index_RK = torch.tensor([[0, 2], [1, 0], [1, 2]])
    rows = torch.tensor([ONE, ONE, NONE])

    found = load_of(experts, (rows, index_RK, torch.ones(3, 2)))

    assert found == ExpertLoad([2, 2], [2, 1])


def test_padding_factor_is_relative_to_the_copies_of_the_batch():
    # One layer, two ranks: 12 rows for 8 copies, each computed whole, or in two parts.
    calls = [[ExpertLoad([4, 4], [3, 1]), ExpertLoad([2, 2], [2, 2])]]

    assert padding_factor(calls, 8, 1) == pytest.approx(0.5)
    assert padding_factor(calls, 4, 2) == pytest.approx(0.5)
    assert padding_factor([calls[0], calls[0]], 6, 1) == pytest.approx(1.0)


def test_imbalance_is_the_largest_share_over_the_mean():
    even = [ExpertLoad([2, 2], [2, 2]), ExpertLoad([2, 2], [2, 2])]
    # Experts 6, 0, 1, 1: 6 / 2. Ranks 6, 2: 6 / 4.
    uneven = [ExpertLoad([9, 9], [6, 0]), ExpertLoad([9, 9], [1, 1])]

    assert imbalance([uneven]) == {"experts": 3.0, "ranks": 1.5}
    assert imbalance([even, uneven]) == {"experts": 2.0, "ranks": 1.25}


def test_rows_are_those_of_matrices():
    matrices = torch.tensor([[ONE, NONE], [NONE, ONE]])

    assert count_rows([matrices, torch.tensor([NONE]), torch.zeros(7)]) == (5, 3)


def _sent_by_decode() -> tuple[int, int]:
    place = build_topology(2, 1)
    dispatcher = DecodeDispatcher(2, place)
    dispatcher.capacity = 3
    tokens = (1, 3)[place.lane]
    routing = torch.zeros(tokens, 1, dtype=torch.long), torch.ones(tokens, 1)
    with WireCount() as wire:
        dispatcher.dispatch(torch.ones(tokens, 4), *routing)
    return wire.messages[0].rows, wire.messages[0].empty_rows


def test_decode_sends_empty_rows_for_a_lane_with_fewer_tokens():
    # Three rows to each of two ranks; one lane has a single token.
    assert run_on_ranks(2, _sent_by_decode) == [(6, 4), (6, 0)]
