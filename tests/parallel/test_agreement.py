"""Ranks compare options, checkpoint and versions before they work."""

from __future__ import annotations

import torch

from resmoe_dist.errors import UserError
from resmoe_dist.parallel.agreement import check_agreement, library_versions
from resmoe_dist.parallel.failures import describe
from tests.ranks import run_on_ranks


def _checked(cases: list[str]) -> list[str | None]:
    """What the check says on this rank, whose value is the character at its number."""
    rank = torch.distributed.get_rank()
    said: list[str | None] = []
    for values in cases:
        try:
            check_agreement({"--seed": values[rank]} | library_versions())
            said.append(None)
        except UserError as error:
            said.append(describe(error, rank))
    return said


def test_every_rank_names_the_rank_that_differs_from_the_most():
    line = (
        "error: rank {0} disagrees with rank {1}: --seed is {2} on rank {0}, {3} on rank {1}; "
        "start all ranks alike"
    )
    expected = {
        "111": None,
        "112": line.format(2, 0, 2, 1),
        "211": line.format(0, 1, 2, 1),
        "123": line.format(1, 0, 2, 1),
    }

    assert run_on_ranks(3, _checked, list(expected)) == [list(expected.values())] * 3


def test_versions_of_what_computes_are_compared():
    assert set(library_versions()) == {"resmoe-dist", "torch", "transformers", "deepspeed"}
    assert library_versions()["torch"].startswith(torch.__version__.partition("+")[0])
