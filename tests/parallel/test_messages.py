"""Tokens and their routing as rows of bytes, and back."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.parallel.dispatch.messages import pack, unpack
from resmoe_dist.routing import NO_EXPERT


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize(
    ("dtype", "hidden", "padding"),
    [(torch.float32, 5, 0), (torch.bfloat16, 6, 0), (torch.bfloat16, 5, 2)],
)
def test_unpacking_gives_what_was_packed(rows, top_k, dtype, hidden, padding):
    x_RH = torch.randn(rows, hidden, dtype=dtype)
    index_RK, weights_RK = torch.randint(-1, 8, (rows, top_k)), torch.rand(rows, top_k)

    packed_RB = pack(x_RH, index_RK, weights_RK)

    assert packed_RB.shape == (rows, hidden * dtype.itemsize + 8 * top_k + padding)
    found = unpack(packed_RB, hidden, dtype, top_k)
    for mine, expected in zip(found, (x_RH, index_RK.int(), weights_RK), strict=True):
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)


def test_rows_beyond_the_tokens_have_no_experts():
    x_TH, index_TK = torch.randn(2, 4), torch.tensor([[3], [0]])

    found = unpack(pack(x_TH, index_TK, torch.ones(2, 1), rows=5), 4, torch.float32, 1)

    assert found.index_RK[:, 0].tolist() == [3, 0] + 3 * [NO_EXPERT]
    assert torch.equal(found.x_RH[:2], x_TH)
    assert not found.x_RH[2:].any()
    assert not found.weights_RK[2:].any()


def test_a_broadcast_routing_can_be_packed():
    index_TK, weights_TK = (torch.tensor([[value]]).expand(3, 2) for value in (1, 0.5))

    found = unpack(pack(torch.zeros(3, 4), index_TK, weights_TK), 4, torch.float32, 2)

    assert torch.equal(found.index_RK, index_TK.int())
    assert torch.equal(found.weights_RK, weights_TK)
