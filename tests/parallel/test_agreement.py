"""Ranks compare options, checkpoint and versions before they work."""

from __future__ import annotations

import pytest
import torch

from resmoe_dist.errors import UserError
from resmoe_dist.parallel.agreement import check_agreement, library_versions
from resmoe_dist.parallel.failures import describe
from tests.ranks import run_on_ranks


def _checked(values: list[str]) -> str | None:
    """What the check says on this rank, which has `values[rank]`."""
    facts = {"--seed": values[torch.distributed.get_rank()]} | library_versions()
    try:
        check_agreement(facts)
    except UserError as error:
        return describe(error, torch.distributed.get_rank())
    return None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1", "1", "1"], None),
        (
            ["1", "1", "2"],
            "error: rank 2 disagrees with rank 0: --seed is 2 on rank 2, 1 on rank 0; start all "
            "ranks alike",
        ),
    ],
)
def test_every_rank_finds_the_same_disagreement(values, expected):
    assert run_on_ranks(3, _checked, values) == [expected] * 3


def test_versions_of_what_computes_are_compared():
    assert set(library_versions()) == {"resmoe-dist", "torch", "transformers", "deepspeed"}
    assert library_versions()["torch"].startswith(torch.__version__.partition("+")[0])
