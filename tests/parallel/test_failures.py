"""What exceptions of libraries mean."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.errors import UserError
from resmoe_dist.parallel.failures import may_be_lost_peer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        # The store's, which names no part of torch.
        (torch.distributed.DistNetworkError("Failed to recv, got 0 bytes."), True),
        (RuntimeError("[gloo] Connection closed by peer"), True),
        (UserError("f: [gloo] is no codec"), False),
        (ValueError("Failed to recv"), False),
    ],
)
def test_errors_of_connections_may_come_from_a_lost_rank(error, expected):
    assert may_be_lost_peer(error) is expected
