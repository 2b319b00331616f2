"""Dispatch and combine on real gloo ranks, against sums written out token by token.

One world per grid runs all cases; the tests then look at what its ranks saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from unittest.mock import patch

import deepspeed.comm as dist
import numpy as np
import pytest
import torch
from torch import Tensor

from resmoe_dist.parallel.dispatcher import Dispatcher
from resmoe_dist.parallel.topology import SINGLE_PROCESS, Topology, build_topology, grid_position
from resmoe_dist.routing import NO_EXPERT, RoutedTokens
from tests.ranks import run_on_ranks

EXPERTS, TOP_K, HIDDEN, LANES = 8, 3, 5, 4


@dataclass(frozen=True)
class Case:
    """Tokens on each lane, and which of the experts their copies go to."""

    tokens: tuple[int, int, int, int]
    experts: tuple[int, ...] = tuple(range(EXPERTS))
    dtype: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32
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
    "bfloat16 weights": Case((5, 1, 3, 2), dtype=torch.bfloat16, weights=torch.bfloat16),
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
        torch.rand(tokens, TOP_K, generator=generator).to(case.weights),
    )


def _expert(x_H: Tensor, expert: int) -> Tensor:
    """Expert number e of these tests: no two are alike, and none maps zero to zero."""
    return x_H * (expert + 1) + expert + 0.5


def counts(tokens: RoutedTokens) -> list[int]:
    """Copies of each local expert."""
    return tokens.offsets_L.diff().tolist()


class Seen(NamedTuple):
    """What one rank saw of one case."""

    tokens: RoutedTokens
    exchanged: list[int]  # tokens that it gave away, then sums
    copies_TH: Tensor  # identity experts, unit weights
    summed_TH: Tensor  # `_expert`, and the case's weights


def _sum_of_experts(tokens: RoutedTokens, owned: range, identity: bool = False) -> Tensor:
    """What this rank's experts make of the tokens: weighted, added up, rounded once."""
    y_RH = torch.zeros(tokens.x_RH.shape)
    copy = 0
    for expert, count in zip(owned, counts(tokens), strict=True):
        for _ in range(count):
            x_H = tokens.x_RH[tokens.token_N[copy]].float()
            weight = 1.0 if identity else float(tokens.weight_N[copy])
            y_RH[tokens.token_N[copy]] += weight * (x_H if identity else _expert(x_H, expert))
            copy += 1
    return y_RH.to(tokens.x_RH.dtype)


def _run_cases(topology: Topology) -> dict[str, Seen]:
    dispatcher = Dispatcher(EXPERTS, topology)
    owned = topology.owned_experts(EXPERTS)
    seen = {}
    for name, case in CASES.items():
        with patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
            tokens, metadata = dispatcher.dispatch(*_inputs(name, topology.lane))
            summed_TH = dispatcher.combine(_sum_of_experts(tokens, owned), metadata)
        given = [call.args[1] for call in exchange.call_args_list]
        exchanged = [len(rows) for rows in given if rows.dtype == case.dtype]
        copies_TH = dispatcher.combine(_sum_of_experts(tokens, owned, identity=True), metadata)
        seen[name] = Seen(tokens, exchanged, copies_TH, summed_TH)
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


class Sums(NamedTuple):
    """Each token's weighted sum over its experts, and that of its terms' magnitudes, in float64."""

    exact: np.ndarray
    magnitude: np.ndarray


def _sums(name: str, lane: int) -> Sums:
    x_TH, index_TK, weights_TK = _inputs(name, lane)
    sums = Sums(*np.zeros((2, *x_TH.shape)))
    for t, k in np.ndindex(*index_TK.shape):
        expert = int(index_TK[t, k])
        if expert != NO_EXPERT:
            weight, x_H = float(weights_TK[t, k]), x_TH[t].double()
            sums.exact[t] += weight * _expert(x_H, expert).numpy()
            # All that `_expert` adds up is positive then.
            sums.magnitude[t] += weight * _expert(x_H.abs(), expert).numpy()
    return sums


def _assert_rounded(name: str, sums: Sums, found: Tensor, exact: np.ndarray, times: int) -> None:
    """So many roundings to the tokens' dtype, beside those of float32."""
    # Half a unit in the last place each, of no more than the sum of the terms' magnitudes.
    dtype = CASES[name].dtype
    rounding = 0 if dtype == torch.float32 else times * torch.finfo(dtype).eps / 2
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert (abs(found.double().numpy() - exact) <= (rounding + 1e-6) * sums.magnitude).all()


@pytest.mark.slow
@every_case
def test_identity_experts_give_each_token_times_its_kept_copies(grid, name):
    shape, results = grid
    for rank, seen in enumerate(results):
        x_TH, index_TK, _ = _inputs(name, _lane_of(shape, rank))
        kept_T1 = (index_TK != NO_EXPERT).sum(1, keepdim=True)
        # Up to three times a number is a sum that is rounded once, however it is put together.
        assert torch.equal(seen[name].copies_TH, (x_TH.float() * kept_T1).to(x_TH.dtype))


@pytest.mark.slow
@every_case
def test_outputs_are_the_weighted_sum_over_each_tokens_experts(grid, name):
    shape, results = grid
    for rank, seen in enumerate(results):
        sums = _sums(name, _lane_of(shape, rank))
        # Each rank's sum is rounded before it travels home, and their sum once more.
        _assert_rounded(name, sums, seen[name].summed_TH, sums.exact, times=2)


@pytest.mark.slow
@every_case
def test_a_rank_receives_each_token_once_and_the_copies_of_its_experts_by_expert(grid, name):
    shape, results = grid
    for rank, seen in enumerate(results):
        dp_rank, ep_rank, _ = grid_position(rank, shape.ep, shape.tp)
        each = EXPERTS // shape.ep
        owned = range(ep_rank * each, (ep_rank + 1) * each)
        rows, copies = [], {expert: [] for expert in owned}
        for lane in range(dp_rank * shape.ep, (dp_rank + 1) * shape.ep):
            x_TH, index_TK, weights_TK = _inputs(name, lane)
            for t, x_H in enumerate(x_TH):
                # Alone, a rank keeps its tokens where they are, wanted or not.
                if shape.ep > 1 and not set(index_TK[t].tolist()) & set(owned):
                    continue
                rows.append(x_H)
                for k, expert in enumerate(index_TK[t].tolist()):
                    if expert in owned:
                        copies[expert].append((len(rows) - 1, float(weights_TK[t, k])))
        tokens = seen[name].tokens
        wanted = torch.stack(rows) if rows else torch.empty(0, HIDDEN)
        assert torch.equal(tokens.x_RH, wanted.to(CASES[name].dtype))
        assert counts(tokens) == [len(copies[expert]) for expert in owned]
        expected = [copy for expert in owned for copy in copies[expert]]
        assert tokens.token_N[: len(expected)].tolist() == [row for row, _ in expected]
        assert tokens.weight_N[: len(expected)].tolist() == [weight for _, weight in expected]


@pytest.mark.slow
@every_case
def test_a_token_is_sent_once_to_each_rank_that_has_some_of_its_experts(grid, name):
    shape, results = grid
    each = EXPERTS // shape.ep
    for rank, seen in enumerate(results):
        index_TK = _inputs(name, _lane_of(shape, rank)).index_TK
        pairs = {(t, e // each) for t, row in enumerate(index_TK.tolist()) for e in row if e >= 0}
        # And of what was received, a sum each goes back.
        expected = [len(pairs), len(seen[name].tokens.x_RH)] if shape.ep > 1 else []
        assert seen[name].exchanged == expected
        if name == "experts of one rank":
            assert len(pairs) == len(index_TK) < index_TK.numel()


@pytest.mark.slow
@every_case
def test_every_grid_gives_a_lane_what_a_single_process_does(grid, name):
    shape, results = grid
    for rank, seen in enumerate(results):
        lane = _lane_of(shape, rank)
        alone = Dispatcher(EXPERTS, SINGLE_PROCESS)
        tokens, metadata = alone.dispatch(*_inputs(name, lane))
        expected = alone.combine(_sum_of_experts(tokens, range(EXPERTS)), metadata)
        # There a sum is rounded once, here twice.
        _assert_rounded(
            name, _sums(name, lane), seen[name].summed_TH, expected.double().numpy(), times=3
        )


@pytest.mark.slow
def test_a_lanes_result_does_not_depend_on_the_tokens_of_other_lanes(grid):
    shape, results = grid
    for rank, seen in enumerate(results):
        if _lane_of(shape, rank) == 0:
            one, other = seen["uneven"], seen["uneven, other tokens beside lane 0"]
            assert torch.equal(one.summed_TH, other.summed_TH)
            if shape.ep > 1:
                assert counts(one.tokens) != counts(other.tokens)


def _one_large_sum() -> Tensor:
    """A token with an expert on three ranks of four, whose sums are 256, 1 and 1."""
    topology = build_topology(4, 1)
    dispatcher = Dispatcher(4, topology)
    _, metadata = dispatcher.dispatch(
        torch.ones(1, 1).bfloat16(), torch.tensor([[0, 1, 2]]), torch.ones(1, 3)
    )
    received = sum(metadata.receive_sizes)
    y_RH = torch.full((received, 1), 1.0 if topology.ep_rank else 256.0, dtype=torch.bfloat16)
    return dispatcher.combine(y_RH, metadata)


@pytest.mark.slow
def test_sums_over_ranks_are_taken_in_float32_and_rounded_once():
    # In bfloat16, 256 + 1 is 256: added one by one, the ones would be lost.
    for combined in run_on_ranks(4, _one_large_sum):
        assert combined.item() == 258
