"""Dispatch and combine on real gloo ranks, against sums written out token by token.

One world per grid runs all cases; the tests then look at what its ranks saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from resmoe_dist.parallel.dispatcher import NO_EXPERT, Dispatcher
from resmoe_dist.parallel.topology import SINGLE_PROCESS, Topology, build_topology, grid_position
from tests.ranks import run_on_ranks

EXPERTS, TOP_K, HIDDEN, LANES = 8, 3, 5, 4


@dataclass(frozen=True)
class Case:
    """Tokens on each lane, and which of the experts their copies go to."""

    tokens: tuple[int, int, int, int]
    experts: tuple[int, ...] = tuple(range(EXPERTS))
    dtype: torch.dtype = torch.float32
    seed: int = 0


ALL = tuple(range(EXPERTS))
CASES = {
    "even": Case((4, 4, 4, 4)),
    "uneven": Case((5, 1, 3, 2)),
    "uneven, other tokens beside lane 0": Case((5, 7, 0, 4), seed=1),
    "no tokens on lane 0": Case((0, 3, 1, 2)),
    "no tokens on lane 1": Case((3, 0, 6, 0)),
    "no tokens anywhere": Case((0, 0, 0, 0)),
    "copies that go nowhere": Case((6, 2, 5, 4), experts=(NO_EXPERT, NO_EXPERT, *ALL)),
    "nothing goes anywhere": Case((3, 2, 1, 4), experts=(NO_EXPERT,)),
    "one expert": Case((5, 3, 2, 4), experts=(5,)),
    "experts of one rank": Case((5, 3, 2, 4), experts=(0, 1)),
    "bfloat16": Case((5, 1, 3, 2), dtype=torch.bfloat16),
    "large": Case((700, 33, 0, 120)),
}


class Inputs(NamedTuple):
    x_TH: Tensor
    index_TK: Tensor
    weights_TK: Tensor


def _inputs(name: str, lane: int) -> Inputs:
    """The tokens of one lane: lane 0's depend on nothing but their number and the experts."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(1000 * lane + (case.seed if lane else 0))
    tokens = case.tokens[lane]
    chosen = torch.randint(len(case.experts), (tokens, TOP_K), generator=generator)
    return Inputs(
        torch.randn(tokens, HIDDEN, generator=generator).to(case.dtype),
        torch.tensor(case.experts)[chosen],
        torch.rand(tokens, TOP_K, generator=generator),
    )


def _expert(x_H: Tensor, expert: int) -> Tensor:
    """Expert number e of these tests: no two are alike, and none maps zero to zero."""
    return x_H * (expert + 1) + expert + 0.5


class Seen(NamedTuple):
    """What one rank saw of one case."""

    received_RH: Tensor
    tokens_per_expert: list[int]
    copies_TH: Tensor  # identity experts, unit weights
    summed_TH: Tensor  # `_expert`, and the case's weights


def _run_cases(topology: Topology) -> dict[str, Seen]:
    dispatcher = Dispatcher(EXPERTS, topology)
    seen = {}
    for name in CASES:
        x_TH, index_TK, weights_TK = _inputs(name, topology.lane)
        received_RH, metadata = dispatcher.dispatch(x_TH, index_TK)
        copies_TH = dispatcher.combine(received_RH, torch.ones_like(weights_TK), metadata)
        owned = topology.owned_experts(EXPERTS)
        parts = received_RH.split(metadata.tokens_per_expert)
        y_RH = torch.cat([_expert(part, e) for part, e in zip(parts, owned, strict=True)])
        summed_TH = dispatcher.combine(y_RH, weights_TK, metadata)
        seen[name] = Seen(received_RH, metadata.tokens_per_expert, copies_TH, summed_TH)
    return seen


def _run_cases_on_rank(ep: int, tp: int) -> dict[str, Seen]:
    seen = _run_cases(build_topology(ep, tp))
    # Rank 0 holds the store through which slower ranks still connect.
    torch.distributed.barrier()
    return seen


class Grid(NamedTuple):
    world: int
    ep: int
    tp: int


# The last one has two rings of expert parallelism (data parallelism).
GRIDS = [Grid(1, 1, 1), Grid(2, 2, 1), Grid(4, 4, 1), Grid(4, 2, 2), Grid(4, 2, 1)]


@pytest.fixture(scope="module", params=GRIDS, ids=lambda grid: "world{}-ep{}-tp{}".format(*grid))
def grid(request: pytest.FixtureRequest) -> tuple[Grid, list[dict[str, Seen]]]:
    """A grid, and what each of its ranks saw of every case."""
    if request.param.world == 1:
        return request.param, [_run_cases(SINGLE_PROCESS)]
    world, ep, tp = request.param
    return request.param, run_on_ranks(world, _run_cases_on_rank, ep, tp)


every_case = pytest.mark.parametrize("name", CASES)


def _lane_of(grid: Grid, rank: int) -> int:
    dp_rank, ep_rank, _ = grid_position(rank, grid.ep, grid.tp)
    return dp_rank * grid.ep + ep_rank


@pytest.mark.slow
@every_case
def test_identity_experts_give_each_token_times_its_kept_copies(grid, name):
    shape, results = grid
    for rank, seen in enumerate(results):
        x_TH, index_TK, _ = _inputs(name, _lane_of(shape, rank))
        for t, x_H in enumerate(x_TH):
            kept = sum(expert != NO_EXPERT for expert in index_TK[t].tolist())
            # Sums of one number in float32, rounded once.
            assert torch.equal(seen[name].copies_TH[t], (x_H.float() * kept).to(x_H.dtype))
        assert seen[name].copies_TH.shape == x_TH.shape


@pytest.mark.slow
@every_case
def test_outputs_are_the_weighted_sum_over_each_tokens_experts(grid, name):
    shape, results = grid
    for rank, seen in enumerate(results):
        x_TH, index_TK, weights_TK = _inputs(name, _lane_of(shape, rank))
        expected = np.zeros(x_TH.shape)
        for t, k in np.ndindex(*index_TK.shape):
            expert = int(index_TK[t, k])
            if expert != NO_EXPERT:
                expected[t] += float(weights_TK[t, k]) * _expert(x_TH[t], expert).double().numpy()
        found = seen[name].summed_TH
        assert found.dtype == x_TH.dtype
        step = torch.finfo(x_TH.dtype).eps
        np.testing.assert_allclose(found.double(), expected, rtol=2 * step, atol=1e-5)


@pytest.mark.slow
@every_case
def test_a_rank_receives_the_copies_of_its_experts_sorted_by_expert(grid, name):
    shape, results = grid
    for rank, seen in enumerate(results):
        dp_rank, ep_rank, _ = grid_position(rank, shape.ep, shape.tp)
        each = EXPERTS // shape.ep
        expected, counts = [], []
        for expert in range(ep_rank * each, (ep_rank + 1) * each):
            copies = []
            for lane in range(dp_rank * shape.ep, (dp_rank + 1) * shape.ep):
                x_TH, index_TK, _ = _inputs(name, lane)
                for t, k in np.ndindex(*index_TK.shape):
                    if index_TK[t, k] == expert:
                        copies.append(x_TH[t])
            expected += copies
            counts.append(len(copies))
        assert seen[name].tokens_per_expert == counts
        wanted = torch.stack(expected) if expected else torch.empty(0, HIDDEN)
        assert torch.equal(seen[name].received_RH, wanted.to(CASES[name].dtype))


@pytest.mark.slow
@every_case
def test_every_grid_gives_a_lane_the_bits_of_a_single_process(grid, name):
    shape, results = grid
    for rank, seen in enumerate(results):
        lane = _lane_of(shape, rank)
        alone = Dispatcher(EXPERTS, SINGLE_PROCESS)
        x_TH, index_TK, weights_TK = _inputs(name, lane)
        received_RH, metadata = alone.dispatch(x_TH, index_TK)
        parts = enumerate(received_RH.split(metadata.tokens_per_expert))
        y_RH = torch.cat([_expert(part, e) for e, part in parts])
        expected = alone.combine(y_RH, weights_TK, metadata)
        assert torch.equal(seen[name].summed_TH, expected)


@pytest.mark.slow
def test_a_lanes_result_does_not_depend_on_the_tokens_of_other_lanes(grid):
    shape, results = grid
    for rank, seen in enumerate(results):
        if _lane_of(shape, rank) == 0:
            one, other = seen["uneven"], seen["uneven, other tokens beside lane 0"]
            assert torch.equal(one.summed_TH, other.summed_TH)
            if shape.ep > 1:
                assert one.tokens_per_expert != other.tokens_per_expert


def test_no_copy_of_a_token_is_sent_for_an_expert_that_is_none():
    x_TH = torch.randn(2, HIDDEN)
    index_TK = torch.tensor([[NO_EXPERT, 3, NO_EXPERT], [NO_EXPERT] * 3])

    received_RH, metadata = Dispatcher(EXPERTS, SINGLE_PROCESS).dispatch(x_TH, index_TK)

    assert torch.equal(received_RH, x_TH[:1])
    assert metadata.tokens_per_expert == [0, 0, 0, 1, 0, 0, 0, 0]


def test_sums_are_taken_in_float32_and_rounded_once():
    # In bfloat16, 256 + 1 is 256: added one by one, the ones would be lost.
    x_TH = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)
    dispatcher = Dispatcher(4, SINGLE_PROCESS)
    _, metadata = dispatcher.dispatch(x_TH[:1], torch.tensor([[0, 1, 2]]))

    combined = dispatcher.combine(x_TH[[0, 1, 1]], torch.ones(1, 3), metadata)

    assert combined.item() == 258
