"""What exceptions of libraries mean."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.errors import OptionError, UserError
from resmoe_dist.parallel.failures import describe, may_be_lost_peer


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


@pytest.mark.parametrize(
    ("error", "rank", "line"),
    [
        (OptionError("--ep two: not a whole number"), 1, "error: --ep two: not a whole number"),
        (UserError("model: no such folder"), 1, "error: rank 1: model: no such folder"),
        (UserError("model: no such folder"), 0, "error: model: no such folder"),
    ],
)
def test_a_mistake_before_joining_names_a_rank_that_may_be_alone_with_it(error, rank, line):
    assert describe(error, rank, joined=False) == line
