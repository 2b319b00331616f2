"""Tokens and their routing as rows of bytes, and back."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.parallel.dispatch.messages import pack, unpack


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacking_gives_what_was_packed(rows, top_k, dtype):
    x_RH = torch.randn(rows, 6, dtype=dtype)
    index_RK, weights_RK = torch.randint(-1, 8, (rows, top_k)), torch.rand(rows, top_k)

    packed_RB = pack(x_RH, index_RK, weights_RK)

    assert packed_RB.shape == (rows, 6 * dtype.itemsize + 8 * top_k)
    found = unpack(packed_RB, 6, dtype, top_k)
    for mine, expected in zip(found, (x_RH, index_RK.int(), weights_RK), strict=True):
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)
