"""Routed copies of a single process."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.routing import NO_EXPERT, RoutedTokens, expert_offsets

EXPERTS, HIDDEN = 8, 5


def route(index_TK: list[list[int]], weights_TK: list[list[float]] | None = None) -> RoutedTokens:
    index = torch.tensor(index_TK)
    weights = torch.rand(index.shape) if weights_TK is None else torch.tensor(weights_TK)
    return RoutedTokens.from_routing(torch.randn(len(index), HIDDEN), index, weights, EXPERTS)


def test_copies_are_sorted_by_expert_then_token():
    routed = route([[5, 2], [2, 0], [5, 0]], [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])

    assert routed.token_N.tolist() == [1, 2, 0, 1, 0, 2]
    assert routed.weight_N.tolist() == pytest.approx([0.4, 0.6, 0.2, 0.3, 0.1, 0.5])
    assert routed.offsets_L.tolist() == [0, 2, 2, 4, 4, 4, 6, 6, 6]
    assert routed.expert_N.tolist() == [0, 0, 2, 2, 5, 5]


def test_dropped_copies_come_last_with_weight_zero():
    routed = route([[NO_EXPERT, 3, NO_EXPERT], [NO_EXPERT] * 3])

    assert routed.offsets_L.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert routed.token_N[0] == 0
    assert routed.weight_N[0] > 0
    assert not routed.weight_N[1:].any()
    assert routed.expert_N.tolist() == [3] + [EXPERTS] * 5


def test_copies_for_experts_that_are_not_local_are_dropped():
    index_TK, weights_TK = torch.tensor([[5, 2, 4], [1, 7, NO_EXPERT]]), torch.full((2, 3), 0.5)

    routed = RoutedTokens.from_routing(torch.randn(2, HIDDEN), index_TK, weights_TK, 3, 4)

    assert routed.offsets_L.tolist() == [0, 1, 2, 2]
    assert routed.without_dropped().token_N.tolist() == [0, 0]
    assert routed.weight_N.tolist() == [0.5] * 2 + [0.0] * 4


def test_a_token_that_chooses_an_expert_twice_has_two_copies():
    routed = route([[2, 2, 5]], [[0.5, 0.25, 1.0]])

    assert routed.offsets_L.diff().tolist() == [0, 0, 2, 0, 0, 1, 0, 0]
    assert routed.weight_N.tolist() == [0.5, 0.25, 1.0]


def test_weights_are_float32_whatever_the_routers_dtype():
    index_TK, weights_TK = torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.25]]).bfloat16()

    routed = RoutedTokens.from_routing(torch.randn(1, HIDDEN), index_TK, weights_TK, EXPERTS)

    assert routed.weight_N.dtype == torch.float32
    assert routed.weight_N.tolist() == [0.25, 0.5]


def test_no_tokens_have_no_copies():
    routed = RoutedTokens.from_routing(
        torch.randn(0, HIDDEN), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), EXPERTS
    )

    assert len(routed.token_N) == 0
    assert routed.offsets_L.tolist() == [0] * (EXPERTS + 1)


@pytest.mark.parametrize("copies", [0, 1, 50])
def test_expert_offsets_count_the_copies_before_each_expert(copies):
    expert_N = torch.randint(EXPERTS, (copies,)).sort().values

    offsets = expert_offsets(expert_N, EXPERTS).tolist()

    assert offsets == [int((expert_N < expert).sum()) for expert in range(EXPERTS + 1)]
